//! The root window: guest-physical addresses beside RAM, in which a child finds its
//! root image to map instead of to read.
//!
//! ```text
//!   the VM is made:   zeroes ................................  one mapping, one slot
//!   a child starts:   the image's file | zeroes .............  one mmap over its start
//! ```
//! KVM's slot is read-only, and knows host addresses, not files: what is mapped there
//! can change under it with no call to KVM, and that is what makes late binding one
//! mmap. A slot that is set after the irqchip would wait for a grace period.
//!
//! The pages are the host's page cache, shared by all children of an image. A freeze
//! copies nothing of them. Devices hand them to system calls, for a driver that writes
//! straight from a mapped file ([`devices::DeviceMemory::rom`]). The monitor itself
//! never reads them, so a file that is cut short under a guest ends that guest (KVM_RUN
//! says EFAULT) and not its process.

use crate::error::Error;
use crate::layout::Window;
use devices::GuestMemory;
use rustix::mm::{MapFlags, ProtFlags, mmap};
use std::fs::File;
use std::io;
use std::ptr::with_exposed_provenance_mut;
use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};
use vm_run_abi::PAGE_SIZE;

/// The window of one VM, mapped in the host.
#[derive(Debug)]
pub(crate) struct RootWindow {
    window: Window,
    /// The window alone.
    memory: GuestMemory,
    /// Where that is mapped in this process.
    address: u64,
    /// Bytes of the image in it.
    image: Option<u64>,
}

impl RootWindow {
    /// A window of zeroes, which cost no memory.
    ///
    /// # Errors
    /// What mmap says.
    pub(crate) fn new(window: Window) -> Result<Self, Error> {
        let failed = |e: io::Error| Error::memory("mmap")(e);
        let mapping = MmapRegion::build(
            None,
            window.len as usize,
            libc::PROT_READ,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        )
        .map_err(|e| failed(io::Error::other(e)))?;
        let address = mapping.as_ptr().expose_provenance() as u64;
        let region = GuestRegionMmap::new(mapping, GuestAddress(window.gpa))
            .ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
        let memory =
            GuestMemory::from_regions(vec![region]).map_err(|e| failed(io::Error::other(e)))?;
        Ok(Self {
            window,
            memory,
            address,
            image: None,
        })
    }

    /// Where it is in the guest.
    pub(crate) fn place(&self) -> Window {
        self.window
    }

    /// For KVM_SET_USER_MEMORY_REGION: (guest-physical, host address, length).
    pub(crate) fn slot(&self) -> (u64, u64, u64) {
        let Window { gpa, len } = self.window;
        (gpa, self.address, len)
    }

    /// For devices: read-only, and only for system calls.
    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Where the image lies in this process, if it does: (address, length), in bytes.
    pub(crate) fn image(&self) -> Option<(u64, u64)> {
        self.image.map(|len| (self.address, len))
    }

    /// Puts an image into the window, before the guest runs. An image that does not
    /// fit, or does not end with a page (what follows in its last page would be the
    /// guest's to see as part of it), is left out: the guest reads it from its disk.
    ///
    /// # Errors
    /// A second image, or what the system says.
    pub(crate) fn bind(&mut self, file: &File) -> Result<(), Error> {
        if self.image.is_some() {
            return Err(Error::Phase("given a second root image"));
        }
        let metadata = file.metadata().map_err(Error::memory("fstat"))?;
        let len = metadata.len();
        let fits = (1..=self.window.len).contains(&len) && len.is_multiple_of(PAGE_SIZE);
        if !metadata.is_file() || !fits {
            return Ok(());
        }
        let address = with_exposed_provenance_mut(self.address as usize);
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: MAP_FIXED replaces the first `len` bytes of the region of `memory`,
        // which is mapped as long as this object lives and at least that long (`fits`).
        // This process has no reference into it: the guest reads it through KVM, and
        // devices hand it to system calls, neither before it runs.
        unsafe { mmap(address, len as usize, ProtFlags::READ, flags, file, 0) }
            .map_err(Error::memory("mmap of the root image"))?;
        self.image = Some(len);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::root_window;
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::os::unix::fs::FileExt;

    const MIB: u64 = 1 << 20;

    fn window() -> RootWindow {
        RootWindow::new(root_window(64 * MIB)).expect("mapped")
    }

    fn file(len: u64) -> File {
        let file = File::from(memfd_create("image", MemfdFlags::CLOEXEC).expect("a file"));
        file.set_len(len).expect("sized");
        file.write_all_at(b"image", 0).expect("written");
        file
    }

    /// As another process would read it.
    fn read<const N: usize>(window: &RootWindow, at: u64) -> [u8; N] {
        let (_, address, _) = window.slot();
        let mut bytes = [0; N];
        File::open("/proc/self/mem")
            .and_then(|memory| memory.read_exact_at(&mut bytes, address + at))
            .expect("it is mapped");
        bytes
    }

    #[test]
    fn an_image_is_in_front_and_zeroes_are_behind() {
        let mut window = window();
        assert_eq!(read(&window, 0), [0; 5]);
        assert_eq!(window.image(), None);
        let image = file(3 * PAGE_SIZE);
        window.bind(&image).expect("fits");
        assert_eq!(&read::<5>(&window, 0), b"image");
        let (_, address, len) = window.slot();
        assert_eq!(window.image(), Some((address, 3 * PAGE_SIZE)));
        assert_eq!(read(&window, 3 * PAGE_SIZE), [0; 5]);
        assert_eq!(read(&window, len - 5), [0; 5]);
        assert!(matches!(window.bind(&image), Err(Error::Phase(_))));
    }

    #[test]
    fn what_does_not_fit_is_left_out() {
        let most = root_window(64 * MIB).len;
        for len in [PAGE_SIZE - 1, PAGE_SIZE + 5, most + PAGE_SIZE] {
            let mut window = window();
            window.bind(&file(len)).expect("no error");
            assert_eq!(window.image(), None, "{len}");
            assert_eq!(read(&window, 0), [0; 5]);
        }
        let mut window = window();
        window.bind(&file(most)).expect("no error");
        assert_eq!(window.image().map(|(_, len)| len), Some(most));
        let directory = File::open("/").expect("opens");
        self::window().bind(&directory).expect("no error");
    }
}
