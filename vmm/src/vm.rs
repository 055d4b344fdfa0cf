//! A virtual machine: booted or restored, paused, saved, ended.

use crate::capture::Trail;
use crate::error::{ConfigError, Error};
use crate::host::Host;
use crate::io::Io;
use crate::kvm::{KvmVm, KvmVmState};
use crate::layout::{CMDLINE_MAX, RamRange, VCPUS_MAX};
use crate::machine::{Devices, DevicesState, Disks, EventSink, Held, VIRTIO_DEVICES, lock};
use crate::memory::{Image, Ram};
use crate::moment::Moment;
use crate::payload::{Payload, linux, micro};
use crate::prepared;
use crate::reaper::{Parts, Reaper};
use crate::vcpu::handle::Vcpu;
use crate::vcpu::state::{self, VcpuState};
use crate::vcpu::thread::{Order, Seat};
use crate::x86_64::boot::{self, Ring};
use crate::x86_64::{cpuid, msr};
use devices::Console;
use kvm_bindings::{CpuId, KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_msr_entry, kvm_regs};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use vm_run_abi::identity;

/// What to boot.
#[derive(Debug, Clone)]
pub struct VmConfig {
    /// Guest memory in bytes: a multiple of 2 MiB.
    pub memory: u64,
    /// How many vCPUs.
    pub vcpus: u8,
    /// What runs in it.
    pub payload: Payload,
}

/// All of a stopped VM but its memory. From disk it is untrusted until
/// [`VmState::check`] and the restore itself have passed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmState {
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) vm: KvmVmState,
    pub(crate) devices: DevicesState,
}

impl VmState {
    /// How many vCPUs it has.
    pub fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// The first vCPU's CPUID.
    pub fn cpuid(&self) -> Option<&CpuId> {
        self.vcpus.first().map(VcpuState::cpuid)
    }

    /// Checks what can be checked without a VM.
    ///
    /// # Errors
    /// A number of vCPUs that no VM has.
    pub fn check(&self) -> Result<(), Error> {
        match u8::try_from(self.vcpus.len()) {
            Ok(1..=VCPUS_MAX) => Ok(()),
            _ => Err(Error::State(format!("{} vCPUs", self.vcpus.len()))),
        }
    }

    /// Makes the interrupt pending by which a guest that was stopped at any instruction
    /// learns that it is a child: each VM that is restored from this takes it, on all
    /// vCPUs, before a program runs in it. See [`Vm::renew`], which does so to a VM.
    pub fn interrupt_for_identity(&mut self) {
        for vcpu in &mut self.vcpus {
            vcpu.interrupt(identity::VECTOR);
        }
    }

    /// Checks it against what this host's KVM reads of its buffers.
    pub(crate) fn check_sizes(&self, xsave_size: usize) -> Result<(), Error> {
        self.vcpus
            .iter()
            .try_for_each(|vcpu| vcpu.check(xsave_size))
    }
}

/// When each part of a VM was there. What was made ahead was there when it was
/// asked for.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Timeline {
    /// The call was made.
    pub asked: Moment,
    /// KVM has a VM.
    pub vm_made: Moment,
    /// Memory is mapped, and KVM knows it.
    pub memory_mapped: Moment,
    /// vCPUs and interrupt controllers have their state.
    pub restored: Moment,
}

/// A virtual machine. Dropping it stops it at once, whatever it does; a thread of
/// the [`Host`] closes it.
pub struct Vm {
    /// `None` only while it drops.
    parts: Option<Parts>,
    reaper: Arc<Reaper>,
    pagemap: Arc<File>,
    pub(crate) trail: Mutex<Option<Trail>>,
    console: Console,
    timeline: Timeline,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm")
            .field("timeline", &self.timeline)
            .finish_non_exhaustive()
    }
}

impl Vm {
    pub(crate) fn new(host: &Host, parts: Parts, console: Console, timeline: Timeline) -> Self {
        Self {
            parts: Some(parts),
            reaper: Arc::clone(&host.reaper),
            pagemap: Arc::clone(&host.pagemap),
            trail: Mutex::default(),
            console,
            timeline,
        }
    }

    /// Makes a machine with these disks and starts it.
    ///
    /// # Errors
    /// A configuration that cannot be, a kernel that is none, or what KVM says.
    pub fn boot(
        host: &Host,
        config: &VmConfig,
        disks: Disks,
        events: &EventSink,
    ) -> Result<Self, Error> {
        check_config(config)?;
        let asked = Moment::now();
        let permit = host.permit()?;
        let (kvm, made) = KvmVm::new(host, || Ram::shared(config.memory))?;
        let fds = kvm.populate(config.vcpus)?;
        let entry = load_payload(&kvm.ram, config)?;
        for (id, vcpu) in (0..).zip(&fds) {
            set_up_vcpu(host, vcpu, id, config, entry)?;
        }
        let console = Console::new();
        let state = DevicesState::new(kvm.window.place());
        let devices = Devices::restore(&state, &kvm, &console)?;
        devices.bind(disks, None, None)?;
        let vcpus = (0..config.vcpus)
            .map(Vcpu::spawn)
            .collect::<Result<Vec<_>, _>>()?;
        for (vcpu, fd) in vcpus.iter().zip(fds) {
            let loaded = vcpu.take(Seat::new(host, &kvm, fd, None))?;
            loaded.recv().map_err(|_| Error::Phase("gone"))??;
        }
        let io = Io::new(host, devices.subscribers());
        let parts = Parts {
            vcpus,
            io,
            devices,
            kvm,
            permit,
        };
        let timeline = Timeline {
            asked,
            vm_made: made.vm,
            memory_mapped: made.memory,
            restored: Moment::now(),
        };
        let vm = Self::new(host, parts, console, timeline);
        prepared::go(vm.parts()?, events, false)?;
        Ok(vm)
    }

    pub(crate) fn pagemap(&self) -> &File {
        &self.pagemap
    }

    pub(crate) fn parts(&self) -> Result<&Parts, Error> {
        self.parts.as_ref().ok_or(Error::Phase("gone"))
    }

    /// The last lines of the serial console.
    pub fn console_tail(&self, lines: usize) -> Vec<String> {
        self.console.tail(lines)
    }

    /// When its parts were there.
    pub fn timeline(&self) -> Timeline {
        self.timeline
    }

    /// Connects to a vsock port of the guest. The guest may refuse later: then
    /// the stream is at its end.
    ///
    /// # Errors
    /// Too many connections, or no descriptor.
    pub fn connect(&self, port: u32) -> std::io::Result<UnixStream> {
        let parts = self.parts().map_err(std::io::Error::other)?;
        parts.io.ensure().map_err(std::io::Error::other)?;
        lock(&parts.devices.vsock).device_mut().connect(port)
    }

    /// Where its memory lies in this process: (address, length), in bytes.
    pub fn mappings(&self) -> Vec<(u64, u64)> {
        let slots = self.parts.iter().flat_map(|parts| parts.kvm.ram.slots());
        slots
            .map(|(_, address, length)| (address, length))
            .collect()
    }

    /// Where its root image lies in this process, if it is mapped into the guest:
    /// (address, length), in bytes. If it is not, the guest reads it from its disk.
    pub fn root_image(&self) -> Option<(u64, u64)> {
        self.parts.as_ref()?.kvm.window.image()
    }

    /// Where its memory lies in the guest.
    pub fn ranges(&self) -> Vec<RamRange> {
        let ram = self.parts.as_ref().map(|parts| parts.kvm.ram.ranges());
        ram.map(<[_]>::to_vec).unwrap_or_default()
    }

    /// Stops all vCPUs at an instruction boundary, with no exit pending.
    ///
    /// # Errors
    /// A vCPU that does not answer or cannot stop there.
    pub fn pause(&self) -> Result<(), Error> {
        let vcpus = &self.parts()?.vcpus;
        let asked = vcpus
            .iter()
            .map(|vcpu| vcpu.ask(Order::Pause))
            .collect::<Result<Vec<_>, _>>()?;
        for (vcpu, answer) in vcpus.iter().zip(asked) {
            vcpu.hear(&answer)??;
        }
        Ok(())
    }

    /// Lets paused or parked vCPUs run on.
    ///
    /// # Errors
    /// A vCPU that has ended.
    pub fn resume(&self) -> Result<(), Error> {
        self.parts()?
            .vcpus
            .iter()
            .try_for_each(|vcpu| vcpu.send(Order::Resume))
    }

    /// Gives a paused VM, stopped at any instruction, another identity: it is to go on
    /// as somebody else. `page` is what [`vm_run_abi::identity`] says; the interrupt that
    /// makes the guest's kernel take it is pending on all vCPUs when this returns, and no
    /// program in it runs before. [`Event::IdentityTaken`](crate::Event::IdentityTaken)
    /// tells of it after [`Self::resume`].
    ///
    /// # Errors
    /// A VM that is not paused, a kernel that takes no such interrupt, or what KVM says:
    /// then it must not go on, for it may be told in part.
    pub fn renew(&self, page: &[u8]) -> Result<(), Error> {
        let parts = self.parts()?;
        for vcpu in &parts.vcpus {
            vcpu.hear(&vcpu.ask(Order::Renew)?)??;
        }
        self.check_kernel()?;
        parts.kvm.ram.write(identity::GPA, page)?;
        for (id, _) in (0..).zip(&parts.vcpus) {
            parts.kvm.interrupt(id, identity::VECTOR)?;
        }
        Ok(())
    }

    /// Has one file in the place of the `count` overlays of its disk above the lowest file,
    /// of which [`merge_overlays`](crate::merge_overlays) has made it. It notices nothing.
    ///
    /// # Errors
    /// A VM without such a disk, or a file that is none of it.
    pub fn replace_layers(&self, count: usize, merged: File) -> Result<(), Error> {
        self.parts()?.devices.replace_layers(count, merged)
    }

    /// Whether its kernel takes an identity at any instruction.
    ///
    /// # Errors
    /// One that does not.
    pub fn check_kernel(&self) -> Result<(), Error> {
        let mut driver = [0; identity::DRIVER.len()];
        let at = identity::GPA + identity::DRIVER_AT;
        self.parts()?.kvm.ram.read(at, &mut driver)?;
        match driver {
            identity::DRIVER => Ok(()),
            _ => Err(Error::Guest(
                "the guest's kernel cannot be told of a new identity: it is not vm-run's own"
                    .into(),
            )),
        }
    }

    /// Ends it, and waits until it is closed.
    pub fn end(mut self) {
        drop(self.parts.take());
    }

    /// Ends a paused VM; what is left of it is a template's two halves.
    ///
    /// # Errors
    /// A VM that is not paused, or what KVM says. The VM is gone in any case.
    pub fn freeze(mut self) -> Result<(Image, VmState), Error> {
        let Some(parts) = self.parts.take() else {
            return Err(Error::Phase("gone"));
        };
        let state = Self::save(&parts, &parts.devices.hold());
        let Parts {
            vcpus,
            io,
            devices,
            kvm,
            permit,
        } = parts;
        drop(vcpus);
        drop(io);
        // Devices hold the guest's memory: all of them have to go before it can
        // be sealed.
        drop(devices);
        let KvmVm { fd, ram, .. } = kvm;
        drop(fd);
        drop(permit);
        let state = state?;
        Ok((ram.into_image(&self.pagemap)?, state))
    }

    /// All of a paused VM but its memory, while its devices are at rest: what they do
    /// after a vCPU was read, its LAPIC would not know.
    pub(crate) fn save(parts: &Parts, devices: &Held<'_>) -> Result<VmState, Error> {
        // One TSC for all: each is read a little later than the one before, and
        // the last and highest is one that no vCPU has yet seen in its past.
        let mut tsc = None;
        for vcpu in &parts.vcpus {
            tsc = vcpu.hear(&vcpu.ask(Order::ReadTsc)?)??;
        }
        let vcpus = parts
            .vcpus
            .iter()
            .map(|vcpu| {
                let answer = vcpu.ask(|reply| Order::Save { tsc, reply })?;
                vcpu.hear(&answer)?.map(|state| *state)
            })
            .collect::<Result<_, _>>()?;
        Ok(VmState {
            vcpus,
            vm: parts.kvm.save()?,
            devices: devices.save(),
        })
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(parts) = self.parts.take() {
            self.reaper.bury(parts);
        }
    }
}

/// Loads what the VM is to run, and says where it begins.
fn load_payload(ram: &Ram, config: &VmConfig) -> Result<u64, Error> {
    match &config.payload {
        Payload::Linux {
            kernel,
            initramfs,
            cmdline,
        } => linux::load(
            ram,
            config.vcpus,
            VIRTIO_DEVICES,
            kernel,
            initramfs,
            cmdline,
        ),
        Payload::Micro(program) => {
            micro::load(ram, program)?;
            Ok(micro::CODE)
        }
    }
}

fn check_config(config: &VmConfig) -> Result<(), ConfigError> {
    if !(1..=VCPUS_MAX).contains(&config.vcpus) {
        return Err(ConfigError::Vcpus(config.vcpus));
    }
    match &config.payload {
        Payload::Linux { cmdline, .. } if cmdline.len() >= CMDLINE_MAX || !cmdline.is_ascii() => {
            Err(ConfigError::CommandLine)
        }
        _ => Ok(()),
    }
}

/// Gives a fresh vCPU what it has when its machine is switched on. All but the
/// first wait for the guest to start them, unless its program begins everywhere.
fn set_up_vcpu(
    host: &Host,
    vcpu: &VcpuFd,
    id: u8,
    config: &VmConfig,
    entry: u64,
) -> Result<(), Error> {
    let entries = cpuid::for_vcpu(&host.cpuid, id, config.vcpus);
    let cpuid = CpuId::from_entries(&entries).map_err(|e| Error::State(format!("CPUID: {e:?}")))?;
    vcpu.set_cpuid2(&cpuid)
        .map_err(Error::kvm("KVM_SET_CPUID2"))?;
    let mut msrs = msr::at_boot().to_vec();
    let (mut ring, mut begins) = (Ring::Kernel, id == 0);
    if let Payload::Micro(program) = &config.payload {
        ring = Ring::User;
        begins |= program.everywhere;
        msrs.extend(program.msrs.iter().map(|&(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        }));
    }
    state::Calls::msrs(vcpu, &state::msrs_of(&msrs)?)?;
    if begins {
        let mut sregs = vcpu.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?;
        boot::set_long_mode(&mut sregs, ring);
        state::Calls::sregs(vcpu, &sregs)?;
        let regs = kvm_regs {
            rdi: id.into(),
            ..boot::registers(entry)
        };
        state::Calls::regs(vcpu, &regs)?;
        let mp_state = KVM_MP_STATE_RUNNABLE;
        state::Calls::mp_state(vcpu, kvm_mp_state { mp_state })?;
    }
    Ok(())
}
