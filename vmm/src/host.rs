//! /dev/kvm, opened once, and what is asked of it once.

use crate::error::{Error, HostError};
use crate::reaper::{Permit, Reaper, VmCounts};
use crate::x86_64::cpuid;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};
use std::fs::File;
use std::sync::Arc;

/// What a thread of a VM is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// It runs one vCPU.
    Vcpu,
    /// It runs the devices' event loop.
    Io,
}

/// Called on each thread of a VM before anything else.
pub type ThreadStart = Arc<dyn Fn(ThreadKind) + Send + Sync>;

/// How many VMs one process has at most, if nothing else is said. Every VM adds
/// an MMU notifier to the process's address space, and each copy-on-write fault
/// walks them all: on one host a fault took 4.2 µs with 1 VM alive, 27 with 100,
/// 267 with 1000.
pub const VMS_PER_PROCESS: usize = 16;

/// The KVM of this host. Everything that is the same for all VMs is read here,
/// once, so that a fork asks for nothing.
pub struct Host {
    pub(crate) kvm: Kvm,
    pub(crate) cpuid: CpuId,
    pub(crate) msrs: Arc<[u32]>,
    pub(crate) reaper: Arc<Reaper>,
    /// Of this process; open early, for there may be no /proc later.
    pub(crate) pagemap: Arc<File>,
    thread_start: ThreadStart,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host")
            .field("vms", &self.vms())
            .finish_non_exhaustive()
    }
}

/// The capabilities that every guest needs; all are in Linux 6.1 on x86-64.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Xsave2, "KVM_CAP_XSAVE2"),
];

impl Host {
    /// Opens /dev/kvm and checks that it can do what is needed.
    ///
    /// # Errors
    /// Why this host cannot run a VM, with the cure.
    pub fn open() -> Result<Self, HostError> {
        let kvm = Kvm::new().map_err(|e| match e.errno() {
            libc::ENOENT | libc::ENXIO | libc::ENODEV => HostError::NoKvm,
            libc::EACCES | libc::EPERM => HostError::Permission,
            _ => HostError::Open(e.into()),
        })?;
        match kvm.get_api_version() {
            12 => {}
            other => return Err(HostError::ApiVersion(other)),
        }
        for (cap, name) in NEEDED {
            if !kvm.check_extension(cap) {
                return Err(HostError::Capability(name));
            }
        }
        let ioctl = |call| {
            move |e: kvm_ioctls::Error| HostError::Ioctl {
                call,
                source: e.into(),
            }
        };
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(ioctl("KVM_GET_SUPPORTED_CPUID"))?;
        let msrs = kvm
            .get_msr_index_list()
            .map_err(ioctl("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(Self {
            kvm,
            cpuid,
            msrs: msrs.as_slice().into(),
            reaper: Arc::new(Reaper::new(VMS_PER_PROCESS)),
            pagemap: Arc::new(File::open("/proc/self/pagemap").map_err(HostError::Proc)?),
            thread_start: Arc::new(|_| {}),
        })
    }

    /// Allows so many VMs in this process, and not [`VMS_PER_PROCESS`].
    pub fn allow_vms(&mut self, most: usize) {
        self.reaper = Arc::new(Reaper::new(most));
    }

    /// Has each thread of a VM call `start` before anything else: the place to
    /// confine it.
    pub fn on_thread_start(&mut self, start: ThreadStart) {
        self.thread_start = start;
    }

    pub(crate) fn thread_start(&self) -> ThreadStart {
        Arc::clone(&self.thread_start)
    }

    pub(crate) fn permit(&self) -> Result<Permit, Error> {
        self.reaper.permit()
    }

    /// How many VMs there are, and have been.
    pub fn vms(&self) -> VmCounts {
        self.reaper.counts()
    }

    /// Waits until every VM that was dropped is closed.
    pub fn settle(&self) {
        self.reaper.settle();
    }

    /// The frequency of a guest's TSC, in kHz.
    ///
    /// # Errors
    /// What KVM says.
    pub fn tsc_khz(&self) -> Result<u32, Error> {
        let vm = self.kvm.create_vm().map_err(Error::kvm("KVM_CREATE_VM"))?;
        let vcpu = vm.create_vcpu(0).map_err(Error::kvm("KVM_CREATE_VCPU"))?;
        vcpu.get_tsc_khz().map_err(Error::kvm("KVM_GET_TSC_KHZ"))
    }

    /// The CPU as guests of this host see it.
    pub fn cpu(&self) -> Cpu {
        Cpu::new(&cpuid::for_vcpu(&self.cpuid, 0, 1))
    }
}

/// A CPU as a guest sees it: a template made on one goes on only on its equal.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    /// `GenuineIntel`, `AuthenticAMD`, ...
    pub vendor: String,
    /// As /proc/cpuinfo has it.
    pub family: u32,
    /// As /proc/cpuinfo has it.
    pub model: u32,
    /// All feature words, in hexadecimal: leaves 1, 7, 0xD, 0x80000001 and
    /// 0x80000008, and KVM's own.
    pub features: String,
}

impl Cpu {
    fn new(entries: &[kvm_bindings::kvm_cpuid_entry2]) -> Self {
        let leaf = |function, index| {
            entries
                .iter()
                .find(|e| e.function == function && e.index == index)
                .copied()
                .unwrap_or_default()
        };
        let name = leaf(0, 0);
        let vendor: Vec<u8> = [name.ebx, name.edx, name.ecx]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        let (one, seven, seven1) = (leaf(1, 0), leaf(7, 0), leaf(7, 1));
        let (xsave, xsave1) = (leaf(0xd, 0), leaf(0xd, 1));
        let (ext, ext8) = (leaf(0x8000_0001, 0), leaf(0x8000_0008, 0));
        let words = [
            one.ecx,
            one.edx,
            seven.ebx,
            seven.ecx,
            seven.edx,
            seven1.eax,
            xsave.eax,
            xsave.edx,
            xsave1.eax,
            xsave1.ecx,
            ext.ecx,
            ext.edx,
            ext8.ebx,
            leaf(0x4000_0001, 0).eax,
        ];
        let base = one.eax >> 8 & 0xf;
        let family = if base == 0xf {
            base + (one.eax >> 20 & 0xff)
        } else {
            base
        };
        let high = if base == 0xf || base == 6 {
            one.eax >> 12 & 0xf0
        } else {
            0
        };
        Self {
            vendor: String::from_utf8_lossy(&vendor).into_owned(),
            family,
            model: high | one.eax >> 4 & 0xf,
            features: words.map(|word| format!("{word:08x}")).join(" "),
        }
    }
}

impl std::fmt::Display for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} family {} model {}",
            self.vendor, self.family, self.model
        )
    }
}
