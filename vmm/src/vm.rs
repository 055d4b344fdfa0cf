//! A virtual machine: booted or restored, paused, saved, ended.

use crate::error::{ConfigError, Error};
use crate::host::Host;
use crate::io::IoThread;
use crate::kvm::{KvmVm, KvmVmState};
use crate::layout::{CMDLINE_MAX, VCPUS_MAX};
use crate::machine::{Bus, Devices, DevicesState, Disks, EventSink, VIRTIO_DEVICES, lock};
use crate::memory::{Image, Ram};
use crate::payload::{Payload, linux, micro};
use crate::vcpu::kick;
use crate::vcpu::state::{self, VcpuState};
use crate::vcpu::thread::{self, Order};
use crate::x86_64::boot::{self, Ring};
use crate::x86_64::{cpuid, msr};
use devices::Console;
use kvm_bindings::{CpuId, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::signal::Killable;

/// How long a vCPU may take to leave the guest when it is told to. It needs
/// microseconds; a host under heavy load may keep it from running.
const KICK_TIMEOUT: Duration = Duration::from_secs(30);

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
    devices: DevicesState,
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
}

/// When each part of a VM was there.
#[derive(Debug, Clone, Copy)]
pub struct Timeline {
    /// The call was made.
    pub asked: Instant,
    /// KVM has a VM.
    pub vm_made: Instant,
    /// Memory is mapped, and KVM knows it.
    pub memory_mapped: Instant,
    /// vCPUs, interrupt controllers and devices have their state.
    pub restored: Instant,
}

/// A virtual machine. Dropping it ends it, whatever it does, and leaves nothing.
pub struct Vm {
    // Fields drop in this order: vCPUs first, so that no device is touched by a
    // guest; then the event loop; the memory last.
    vcpus: Vec<Vcpu>,
    _io: IoThread,
    devices: Devices,
    kvm: KvmVm,
    console: Console,
    timeline: Timeline,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm")
            .field("vcpus", &self.vcpus.len())
            .field("memory", &self.kvm.ram.ranges())
            .finish_non_exhaustive()
    }
}

/// A vCPU's thread, seen from outside. Dropping it ends the thread.
struct Vcpu {
    id: u8,
    /// `None` only while it drops.
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<()>>,
}

impl Vm {
    /// Makes a machine and starts it.
    ///
    /// # Errors
    /// A configuration that cannot be, a kernel that is none, or what KVM says.
    pub fn boot(host: &Host, config: &VmConfig, events: EventSink) -> Result<Self, Error> {
        check_config(config)?;
        let asked = Instant::now();
        let (kvm, fds, made) = KvmVm::new(host, config.vcpus, || Ram::shared(config.memory))?;
        let entry = match &config.payload {
            Payload::Linux {
                kernel,
                initramfs,
                cmdline,
            } => linux::load(
                &kvm.ram,
                config.vcpus,
                VIRTIO_DEVICES,
                kernel,
                initramfs,
                cmdline,
            )?,
            Payload::Micro(program) => {
                micro::load(&kvm.ram, program)?;
                micro::CODE
            }
        };
        for (id, vcpu) in (0..).zip(&fds) {
            set_up_vcpu(host, vcpu, id, config, entry)?;
        }
        let devices = DevicesState::default();
        Self::start(
            host,
            kvm,
            fds,
            &devices,
            Disks::default(),
            events,
            |restored| Timeline {
                asked,
                vm_made: made.vm,
                memory_mapped: made.memory,
                restored,
            },
        )
    }

    /// Makes a child: `image` mapped private, `state` restored, `patches`
    /// (address, bytes) written into its memory, and started.
    ///
    /// # Errors
    /// A state that is not usable here, or what KVM says. Nothing is left.
    pub fn restore(
        host: &Host,
        image: &Image,
        state: &VmState,
        disks: Disks,
        patches: &[(u64, &[u8])],
        events: EventSink,
    ) -> Result<Self, Error> {
        let asked = Instant::now();
        state.check()?;
        let vcpus = state.vcpus.len() as u8;
        let (kvm, fds, made) = KvmVm::new(host, vcpus, || Ram::private(image))?;
        for (gpa, bytes) in patches {
            kvm.ram.write(*gpa, bytes)?;
        }
        restore_state(&kvm, &fds, state)?;
        let vm = Self::start(host, kvm, fds, &state.devices, disks, events, |restored| {
            Timeline {
                asked,
                vm_made: made.vm,
                memory_mapped: made.memory,
                restored,
            }
        })?;
        vm.devices.kick();
        Ok(vm)
    }

    fn start(
        host: &Host,
        kvm: KvmVm,
        fds: Vec<VcpuFd>,
        state: &DevicesState,
        disks: Disks,
        events: EventSink,
        timeline: impl FnOnce(Instant) -> Timeline,
    ) -> Result<Self, Error> {
        kick::install()?;
        let console = Console::new();
        let devices = Devices::restore(state, &kvm.fd, kvm.ram.memory(), &console, disks)?;
        let timeline = timeline(Instant::now());
        let bus = Arc::new(Bus::new(&devices));
        let host_msrs: Arc<[u32]> = host.msrs.clone();
        let vcpus = (0..)
            .zip(fds)
            .map(|(id, vcpu)| {
                let (orders, receiver) = mpsc::channel();
                Vcpu::spawn(
                    orders,
                    thread::Context {
                        id,
                        vcpu,
                        bus: Arc::clone(&bus),
                        orders: receiver,
                        events: Arc::clone(&events),
                        host_msrs: Arc::clone(&host_msrs),
                        xsave_size: kvm.xsave_size,
                        identity_told: false,
                    },
                )
            })
            .collect::<Result<Vec<_>, _>>()?;
        // After the vCPUs: their first instructions need no device.
        let io = IoThread::spawn(devices.subscribers())?;
        Ok(Self {
            vcpus,
            _io: io,
            devices,
            kvm,
            console,
            timeline,
        })
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
        lock(&self.devices.vsock).device_mut().connect(port)
    }

    /// Stops all vCPUs at an instruction boundary, with no exit pending.
    ///
    /// # Errors
    /// A vCPU that does not answer or cannot stop there.
    pub fn pause(&self) -> Result<(), Error> {
        let asked = self
            .vcpus
            .iter()
            .map(|vcpu| vcpu.ask(Order::Pause))
            .collect::<Result<Vec<_>, _>>()?;
        for (vcpu, answer) in self.vcpus.iter().zip(asked) {
            vcpu.hear(&answer)??;
        }
        Ok(())
    }

    /// Lets paused or parked vCPUs run on.
    ///
    /// # Errors
    /// A vCPU that has ended.
    pub fn resume(&self) -> Result<(), Error> {
        self.vcpus
            .iter()
            .try_for_each(|vcpu| vcpu.send(Order::Resume))
    }

    /// Ends a paused VM; what is left of it is a template's two halves.
    ///
    /// # Errors
    /// A VM that is not paused, or what KVM says. The VM is gone in any case.
    pub fn freeze(self) -> Result<(Image, VmState), Error> {
        let state = self.save()?;
        let Self {
            vcpus,
            _io: io,
            devices,
            kvm,
            ..
        } = self;
        drop(vcpus);
        drop(io);
        // Devices hold the guest's memory: all of them have to go before it can
        // be sealed.
        drop(devices);
        let KvmVm { fd, ram, .. } = kvm;
        drop(fd);
        Ok((ram.into_image()?, state))
    }

    fn save(&self) -> Result<VmState, Error> {
        // One TSC for all: each is read a little later than the one before, and
        // the last and highest is one that no vCPU has yet seen in its past.
        let mut tsc = None;
        for vcpu in &self.vcpus {
            tsc = vcpu.hear(&vcpu.ask(Order::ReadTsc)?)??;
        }
        let vcpus = self
            .vcpus
            .iter()
            .map(|vcpu| {
                let answer = vcpu.ask(|reply| Order::Save { tsc, reply })?;
                vcpu.hear(&answer)?.map(|state| *state)
            })
            .collect::<Result<_, _>>()?;
        Ok(VmState {
            vcpus,
            vm: self.kvm.save()?,
            devices: self.devices.save(),
        })
    }
}

/// Gives a fresh VM everything of `state` but its devices. A state from disk is
/// checked here, before KVM reads its buffers.
pub(crate) fn restore_state(kvm: &KvmVm, fds: &[VcpuFd], state: &VmState) -> Result<(), Error> {
    for (vcpu, state) in fds.iter().zip(&state.vcpus) {
        state.check(kvm.xsave_size)?;
        // A KVM that cannot tell scales nothing: 0 Hz differs from nothing.
        let host_khz = vcpu.get_tsc_khz().unwrap_or(state.tsc_khz);
        state::restore(vcpu, state, host_khz)?;
    }
    kvm.restore(&state.vm)
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
/// first wait for the guest to start them.
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
    let mut ring = Ring::Kernel;
    if let Payload::Micro(program) = config.payload {
        ring = Ring::User;
        msrs.extend(program.msrs.iter().map(|&(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        }));
    }
    state::Calls::msrs(vcpu, &state::msrs_of(&msrs)?)?;
    if id == 0 {
        let mut sregs = vcpu.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?;
        boot::set_long_mode(&mut sregs, ring);
        state::Calls::sregs(vcpu, &sregs)?;
        state::Calls::regs(vcpu, &boot::registers(entry))?;
    }
    Ok(())
}

impl Vcpu {
    fn spawn(orders: Sender<Order>, context: thread::Context) -> Result<Self, Error> {
        let id = context.id;
        let thread = std::thread::Builder::new()
            .name(format!("vcpu-{id}"))
            .spawn(move || thread::main(context))
            .map_err(Error::os("thread"))?;
        Ok(Self {
            id,
            orders: Some(orders),
            thread: Some(thread),
        })
    }

    fn send(&self, order: Order) -> Result<(), Error> {
        let sent = self.orders.as_ref().map(|orders| orders.send(order));
        match sent {
            Some(Ok(())) => Ok(()),
            _ => Err(Error::Unresponsive(self.id)),
        }
    }

    /// Gives an order that is answered, and gets the vCPU out of the guest.
    fn ask<T>(&self, order: impl FnOnce(SyncSender<T>) -> Order) -> Result<Receiver<T>, Error> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(order(reply))?;
        self.kick();
        Ok(answer)
    }

    fn hear<T>(&self, answer: &Receiver<T>) -> Result<T, Error> {
        answer
            .recv_timeout(KICK_TIMEOUT)
            .map_err(|_| Error::Unresponsive(self.id))
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread
            && !thread.is_finished()
            && let Err(error) = thread.kill(kick::signal())
        {
            log::debug!("vCPU {} is gone: {error}", self.id);
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        // No more orders: the thread ends when it next looks, which is now.
        self.orders = None;
        self.kick();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of vCPU {} has panicked", self.id);
        }
    }
}
