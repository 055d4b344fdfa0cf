//! One VM of KVM: made in the order that is cheap and that KVM allows.

use crate::error::Error;
use crate::host::Host;
use crate::layout::{IDENTITY_MAP, LAPIC, TSS, root_window};
use crate::memory::{PageSet, Ram, take_news};
use crate::moment::Moment;
use crate::window::RootWindow;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY, kvm_clock_data, kvm_irqchip, kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The KVM calls that make a VM; implemented by [`VmFd`], and by a recorder in
/// tests.
trait Calls {
    type Vcpu;
    /// `place`: guest-physical, host address, length. `flags`: KVM_MEM_*.
    fn memory_slot(&self, slot: u32, place: (u64, u64, u64), flags: u32) -> Result<(), Error>;
    fn identity_map(&self, gpa: u64) -> Result<(), Error>;
    fn tss(&self, gpa: u64) -> Result<(), Error>;
    fn irqchip(&self) -> Result<(), Error>;
    fn vcpu(&self, id: u8) -> Result<Self::Vcpu, Error>;
}

/// A VM with its memory, interrupt controllers and vCPUs. It holds the memory and
/// the root window, so that a slot never outlives what it points to.
#[derive(Debug)]
pub(crate) struct KvmVm {
    pub(crate) fd: Arc<VmFd>,
    pub(crate) ram: Ram,
    pub(crate) window: RootWindow,
    pub(crate) xsave_size: usize,
}

/// The state of a VM beside its vCPUs and devices.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct KvmVmState {
    clock: kvm_clock_data,
    pic: [kvm_irqchip; 2],
    ioapic: kvm_irqchip,
}

impl KvmVmState {
    /// To be called before any vCPU runs: a clock that is set under a running
    /// vCPU jumps (cloud-hypervisor#7930).
    pub(crate) fn set_clock(&self, vm: &VmFd) -> Result<(), Error> {
        vm.set_clock(&self.clock)
            .map_err(Error::kvm("KVM_SET_CLOCK"))
    }
}

/// When the parts of a VM were there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Made {
    pub(crate) vm: Moment,
    pub(crate) memory: Moment,
}

impl KvmVm {
    /// Makes a VM over the memory that `map` gives. Interrupt controllers and vCPUs
    /// come with [`Self::populate`].
    pub(crate) fn new(
        host: &Host,
        map: impl FnOnce() -> Result<Ram, Error>,
    ) -> Result<(Self, Made), Error> {
        let fd = host.kvm.create_vm().map_err(Error::kvm("KVM_CREATE_VM"))?;
        let (fd, vm) = (Arc::new(fd), Moment::now());
        let this = Self::over(fd, map()?)?;
        let memory = Moment::now();
        Ok((this, Made { vm, memory }))
    }

    /// Makes interrupt controllers and vCPUs; once.
    pub(crate) fn populate(&self, vcpus: u8) -> Result<Vec<VcpuFd>, Error> {
        populate(&*self.fd, vcpus)
    }

    /// Gives a VM its memory, and the root window that belongs to so much of it.
    fn over(fd: Arc<VmFd>, ram: Ram) -> Result<Self, Error> {
        let window = RootWindow::new(root_window(ram.bytes()))?;
        set_slots(&*fd, &ram, &window)?;
        let xsave_size = fd.check_extension_int(Cap::Xsave2).max(4096) as usize;
        Ok(Self {
            fd,
            ram,
            window,
            xsave_size,
        })
    }

    pub(crate) fn save(&self) -> Result<KvmVmState, Error> {
        let chip = |chip_id| -> Result<_, Error> {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            self.fd
                .get_irqchip(&mut chip)
                .map_err(Error::kvm("KVM_GET_IRQCHIP"))?;
            Ok(chip)
        };
        let mut clock = self.fd.get_clock().map_err(Error::kvm("KVM_GET_CLOCK"))?;
        // A child goes on at the instant of the freeze: no real time is added,
        // so no timer storm; its agent sets the wall clock. KVM_SET_CLOCK
        // refuses the flags that KVM_GET_CLOCK reports (api.rst 4.30).
        clock.flags = 0;
        Ok(KvmVmState {
            clock,
            pic: [chip(KVM_IRQCHIP_PIC_MASTER)?, chip(KVM_IRQCHIP_PIC_SLAVE)?],
            ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
        })
    }

    /// Makes an interrupt pending on one vCPU, wherever that is stopped: with interrupts
    /// disabled, in a handler, halted, or beside other interrupts. A message to its
    /// LAPIC, by its number, of fixed delivery (Intel SDM 3A, 11.11; api.rst 4.71).
    pub(crate) fn interrupt(&self, vcpu: u8, vector: u8) -> Result<(), Error> {
        let message = kvm_msi {
            address_lo: LAPIC | u32::from(vcpu) << 12,
            data: vector.into(),
            ..Default::default()
        };
        // A vCPU that the guest has not started has a LAPIC that takes none: that is
        // no error, for no program runs on it.
        self.fd
            .signal_msi(message)
            .map_err(Error::kvm("KVM_SIGNAL_MSI"))?;
        Ok(())
    }

    /// Logs, from now on, what guest and monitor write of the memory. It stays so: what
    /// has been written since the last fork is what the next one has to copy. Costs the
    /// guest a fault at the first write to each page after each [`Self::take_writes`].
    pub(crate) fn log_writes(&self) -> Result<(), Error> {
        self.ram.log_writes();
        for (slot, place) in (0..).zip(self.ram.slots()) {
            self.fd.memory_slot(slot, place, KVM_MEM_LOG_DIRTY_PAGES)?;
        }
        Ok(())
    }

    /// Adds to `blank` what the guest has given back since the last call, and to `written`
    /// what was written since (api.rst 4.8, KVM_GET_DIRTY_LOG; and the monitor's own, of
    /// which KVM does not know). A page that was given back and written later is in both.
    /// What is being written at this moment is in this or in the next.
    pub(crate) fn take_writes(
        &self,
        blank: &mut PageSet,
        written: &mut PageSet,
    ) -> Result<(), Error> {
        // To the end: what is given back later was written before, as far as it is here.
        let mut given_back = self.ram.blanks().lock();
        take_news(&mut given_back, blank);
        self.ram.take_writes(written);
        for (slot, range) in (0..).zip(self.ram.ranges()) {
            let log = self.fd.get_dirty_log(slot, range.len as usize);
            let log = log.map_err(Error::kvm("KVM_GET_DIRTY_LOG"))?;
            written.add_words(range.file_offset, &log);
        }
        Ok(())
    }

    /// For vCPUs that are loaded by threads of their own.
    pub(crate) fn chips(&self, vcpus: usize) -> Arc<Chips> {
        Arc::new(Chips {
            fd: Arc::clone(&self.fd),
            unloaded: AtomicUsize::new(vcpus),
        })
    }
}

/// The interrupt controllers of a VM that is being restored. They come after all
/// LAPICs: what is pending in the IOAPIC is delivered to them when it is set.
pub(crate) struct Chips {
    fd: Arc<VmFd>,
    unloaded: AtomicUsize,
}

impl Chips {
    /// One more vCPU has its state; the last sets the controllers.
    pub(crate) fn vcpu_loaded(&self, state: &KvmVmState) -> Result<(), Error> {
        // The last one must see what the others have done.
        if self.unloaded.fetch_sub(1, Ordering::AcqRel) != 1 {
            return Ok(());
        }
        for chip in state.pic.iter().chain([&state.ioapic]) {
            self.fd
                .set_irqchip(chip)
                .map_err(Error::kvm("KVM_SET_IRQCHIP"))?;
        }
        Ok(())
    }
}

/// A VM that was made ahead of time, without memory: for the floor of a pool.
pub(crate) struct Ahead {
    fd: VmFd,
    pub(crate) vcpus: Vec<VcpuFd>,
}

impl Ahead {
    pub(crate) fn new(host: &Host, vcpus: u8) -> Result<Self, Error> {
        let fd = host.kvm.create_vm().map_err(Error::kvm("KVM_CREATE_VM"))?;
        let vcpus = populate(&fd, vcpus)?;
        Ok(Self { fd, vcpus })
    }

    pub(crate) fn map(self, ram: Ram) -> Result<(KvmVm, Vec<VcpuFd>), Error> {
        Ok((KvmVm::over(Arc::new(self.fd), ram)?, self.vcpus))
    }
}

/// Memory before everything else: a slot that is set after the irqchip waits for
/// a grace period that the irqchip's bus registrations have begun, 1 to 3 jiffies
/// (virt/kvm/kvm_main.c, kvm_swap_active_memslots, synchronize_srcu_expedited).
fn set_slots(vm: &impl Calls, ram: &Ram, window: &RootWindow) -> Result<(), Error> {
    let ram = ram.slots().map(|place| (place, 0));
    let all = ram.chain([(window.slot(), KVM_MEM_READONLY)]);
    for (slot, (place, flags)) in (0..).zip(all) {
        vm.memory_slot(slot, place, flags)?;
    }
    Ok(())
}

/// The identity map is refused once there are vCPUs (api.rst 4.78), the irqchip
/// likewise (4.24). No PIT: it costs a kernel thread, and the guest's timer is
/// the LAPIC's.
fn populate<C: Calls>(vm: &C, vcpus: u8) -> Result<Vec<C::Vcpu>, Error> {
    // What VMX without "unrestricted guest" needs to run real mode; free elsewhere.
    vm.identity_map(IDENTITY_MAP)?;
    vm.tss(TSS)?;
    vm.irqchip()?;
    (0..vcpus).map(|id| vm.vcpu(id)).collect()
}

impl Calls for VmFd {
    type Vcpu = VcpuFd;

    fn memory_slot(
        &self,
        slot: u32,
        (gpa, hva, len): (u64, u64, u64),
        flags: u32,
    ) -> Result<(), Error> {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: gpa,
            memory_size: len,
            userspace_addr: hva,
        };
        // SAFETY: the range is a mapping of `Ram` or `RootWindow`, which hands out
        // `hva` and `len` of the same region, and `KvmVm` keeps both as long as this
        // VM.
        unsafe { self.set_user_memory_region(region) }
            .map_err(Error::kvm("KVM_SET_USER_MEMORY_REGION"))
    }
    fn identity_map(&self, gpa: u64) -> Result<(), Error> {
        self.set_identity_map_address(gpa)
            .map_err(Error::kvm("KVM_SET_IDENTITY_MAP_ADDR"))
    }
    fn tss(&self, gpa: u64) -> Result<(), Error> {
        self.set_tss_address(gpa as usize)
            .map_err(Error::kvm("KVM_SET_TSS_ADDR"))
    }
    fn irqchip(&self) -> Result<(), Error> {
        self.create_irq_chip()
            .map_err(Error::kvm("KVM_CREATE_IRQCHIP"))
    }
    fn vcpu(&self, id: u8) -> Result<VcpuFd, Error> {
        self.create_vcpu(u64::from(id))
            .map_err(Error::kvm("KVM_CREATE_VCPU"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[derive(Default)]
    struct Recorder(RefCell<Vec<String>>);

    impl Recorder {
        fn call(&self, text: String) -> Result<(), Error> {
            self.0.borrow_mut().push(text);
            Ok(())
        }
    }

    impl Calls for Recorder {
        type Vcpu = u8;
        fn memory_slot(
            &self,
            slot: u32,
            (gpa, _, len): (u64, u64, u64),
            flags: u32,
        ) -> Result<(), Error> {
            self.call(format!("slot {slot} {gpa:#x} {len:#x} {flags}"))
        }
        fn identity_map(&self, gpa: u64) -> Result<(), Error> {
            self.call(format!("identity_map {gpa:#x}"))
        }
        fn tss(&self, gpa: u64) -> Result<(), Error> {
            self.call(format!("tss {gpa:#x}"))
        }
        fn irqchip(&self) -> Result<(), Error> {
            self.call("irqchip".into())
        }
        fn vcpu(&self, id: u8) -> Result<u8, Error> {
            self.call(format!("vcpu {id}")).map(|()| id)
        }
    }

    #[test]
    fn memory_comes_before_the_irqchip_and_vcpus_last() {
        let vm = Recorder::default();
        let ram = Ram::shared(4 << 30).expect("memory");
        let window = RootWindow::new(root_window(ram.bytes())).expect("mapped");
        set_slots(&vm, &ram, &window).expect("nothing fails");
        let vcpus = populate(&vm, 2).expect("nothing fails");
        assert_eq!(vcpus, [0, 1]);
        assert_eq!(
            *vm.0.borrow(),
            [
                "slot 0 0x0 0xc0000000 0",
                "slot 1 0x100000000 0x40000000 0",
                // KVM_MEM_READONLY.
                "slot 2 0x140000000 0x40000000 2",
                "identity_map 0xfffbc000",
                "tss 0xfffbd000",
                "irqchip",
                "vcpu 0",
                "vcpu 1",
            ]
        );
    }
}
