//! Vectored I/O between a file descriptor and guest memory, without a copy in
//! between. The only unsafe code of this crate: a `&[u8]` into guest memory,
//! which the safe wrappers of these system calls want, must not exist.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::bitmap::Bitmap;
use vm_memory::volatile_memory::PtrGuardMut;

use crate::GuestSlice;

/// The most slices that one call takes (Linux: UIO_MAXIOV); the rest is left for
/// the next call, as after any short read or write.
const IOV_MAX: usize = 1024;

/// Pointers and lengths for the kernel, and what keeps them valid.
struct IoVec {
    // Field order matters not, presence does: the guards keep the mappings.
    _guards: Vec<PtrGuardMut>,
    entries: Vec<libc::iovec>,
}

impl IoVec {
    fn new(slices: &[GuestSlice<'_>]) -> Self {
        let guards: Vec<PtrGuardMut> = slices
            .iter()
            .take(IOV_MAX)
            .map(GuestSlice::ptr_guard_mut)
            .collect();
        let entries = guards
            .iter()
            .map(|guard| libc::iovec {
                iov_base: guard.as_ptr().cast(),
                iov_len: guard.len(),
            })
            .collect();
        Self {
            _guards: guards,
            entries,
        }
    }

    /// The same, with `head` before the slices; the caller keeps it for as long as this
    /// lives.
    fn with_head(head: (*mut u8, usize), slices: &[GuestSlice<'_>]) -> Self {
        let mut this = Self::new(&slices[..slices.len().min(IOV_MAX - 1)]);
        let head = libc::iovec {
            iov_base: head.0.cast(),
            iov_len: head.1,
        };
        this.entries.insert(0, head);
        this
    }

    /// A message of these, for sendmsg(2) and recvmsg(2): valid for as long as this.
    fn message(&mut self) -> libc::msghdr {
        libc::msghdr {
            msg_name: std::ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: self.entries.as_mut_ptr(),
            msg_iovlen: self.entries.len(),
            msg_control: std::ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        }
    }

    /// No more than `IOV_MAX`, so the cast is exact.
    fn count(&self) -> libc::c_int {
        self.entries.len() as libc::c_int
    }
}

fn offset_of(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Says that a call has written into `slices`: so many bytes, or, if it has failed, maybe
/// any of them.
fn written(slices: &[GuestSlice<'_>], result: &io::Result<usize>) {
    let mut left = result.as_ref().copied().unwrap_or(usize::MAX);
    for slice in slices {
        let len = slice.len().min(left);
        slice.bitmap().mark_dirty(0, len);
        left -= len;
    }
}

/// Repeats `call` while a signal interrupts it.
fn retry(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        if let Ok(count) = usize::try_from(call()) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// `preadv(2)` into `slices`. Fewer bytes than asked for is no error.
pub(super) fn preadv(
    fd: BorrowedFd<'_>,
    slices: &[GuestSlice<'_>],
    offset: u64,
) -> io::Result<usize> {
    let (iov, offset) = (IoVec::new(slices), offset_of(offset)?);
    // SAFETY: each entry points to memory that its guard keeps mapped for as long
    // as `iov` lives, of the length given; the kernel writes nothing else.
    let read = retry(|| unsafe {
        libc::preadv(fd.as_raw_fd(), iov.entries.as_ptr(), iov.count(), offset)
    });
    written(slices, &read);
    read
}

/// `pwritev(2)` from `slices`. Fewer bytes than asked for is no error.
pub(super) fn pwritev(
    fd: BorrowedFd<'_>,
    slices: &[GuestSlice<'_>],
    offset: u64,
) -> io::Result<usize> {
    let (iov, offset) = (IoVec::new(slices), offset_of(offset)?);
    // SAFETY: each entry points to memory that its guard keeps mapped for as long
    // as `iov` lives, of the length given; the kernel only reads it.
    retry(|| unsafe { libc::pwritev(fd.as_raw_fd(), iov.entries.as_ptr(), iov.count(), offset) })
}

/// `readv(2)` into `slices`.
pub(super) fn readv(fd: BorrowedFd<'_>, slices: &[GuestSlice<'_>]) -> io::Result<usize> {
    let iov = IoVec::new(slices);
    // SAFETY: as in `preadv`.
    let read = retry(|| unsafe { libc::readv(fd.as_raw_fd(), iov.entries.as_ptr(), iov.count()) });
    written(slices, &read);
    read
}

/// `readv(2)` of one frame into `head` and then `slices`.
pub(super) fn read_frame(
    fd: BorrowedFd<'_>,
    head: &mut [u8],
    slices: &[GuestSlice<'_>],
) -> io::Result<usize> {
    let iov = IoVec::with_head((head.as_mut_ptr(), head.len()), slices);
    // SAFETY: `head`, which is borrowed mutably, outlives the call; each other entry
    // points to memory that its guard keeps mapped, of the length given; the kernel
    // writes nothing else.
    let read = retry(|| unsafe { libc::readv(fd.as_raw_fd(), iov.entries.as_ptr(), iov.count()) });
    written(slices, &read);
    read
}

/// `writev(2)` of one frame, `head` and then `slices`.
pub(super) fn write_frame(
    fd: BorrowedFd<'_>,
    head: &[u8],
    slices: &[GuestSlice<'_>],
) -> io::Result<usize> {
    let iov = IoVec::with_head((head.as_ptr().cast_mut(), head.len()), slices);
    // SAFETY: `head` outlives the call; each other entry points to memory that its guard
    // keeps mapped, of the length given; the kernel only reads it.
    retry(|| unsafe { libc::writev(fd.as_raw_fd(), iov.entries.as_ptr(), iov.count()) })
}

/// `sendmsg(2)` from `slices` to a socket: does not block, raises no SIGPIPE.
pub(super) fn send(fd: BorrowedFd<'_>, slices: &[GuestSlice<'_>]) -> io::Result<usize> {
    let mut iov = IoVec::new(slices);
    let message = iov.message();
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: `message` and the entries that it points to outlive the call; each
    // entry points to memory that its guard keeps mapped; the kernel only reads it.
    retry(|| unsafe { libc::sendmsg(fd.as_raw_fd(), &message, flags) })
}

/// `sendmsg(2)` of one packet, `head` and then `slices`: waits while the socket is full,
/// raises no SIGPIPE.
pub(super) fn send_packet(
    fd: BorrowedFd<'_>,
    head: &[u8],
    slices: &[GuestSlice<'_>],
) -> io::Result<usize> {
    let mut iov = IoVec::with_head((head.as_ptr().cast_mut(), head.len()), slices);
    let message = iov.message();
    // SAFETY: `message`, the entries that it points to and `head` outlive the call; each
    // other entry points to memory that its guard keeps mapped; the kernel only reads it.
    retry(|| unsafe { libc::sendmsg(fd.as_raw_fd(), &message, libc::MSG_NOSIGNAL) })
}

/// `recvmsg(2)` of one packet into `head` and then `slices`: waits for it. The length is
/// that of the packet, which may be longer than what it was read into.
pub(super) fn receive_packet(
    fd: BorrowedFd<'_>,
    head: &mut [u8],
    slices: &[GuestSlice<'_>],
) -> io::Result<usize> {
    let mut iov = IoVec::with_head((head.as_mut_ptr(), head.len()), slices);
    let mut message = iov.message();
    // SAFETY: `message`, the entries that it points to and `head`, which is borrowed
    // mutably, outlive the call; each other entry points to memory that its guard keeps
    // mapped, of the length given; the kernel writes nothing else. No descriptors are
    // taken: there is no room for control messages.
    let got = retry(|| unsafe { libc::recvmsg(fd.as_raw_fd(), &mut message, libc::MSG_TRUNC) });
    written(slices, &got);
    got
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GuestMemory;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use vm_memory::{GuestAddress, GuestMemoryBackend, Permissions};

    #[test]
    fn what_a_call_has_written_is_logged_and_no_more() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
        let log = || (**memory.find_region(GuestAddress(0)).expect("there")).bitmap();
        log().begin();
        let (at, access) = (GuestAddress(0xfff), Permissions::Write);
        let slices = vm_memory::GuestMemory::get_slices(&memory, at, 0x4000, access)
            .expect("RAM")
            .collect::<Result<Vec<_>, _>>()
            .expect("RAM");
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        theirs.write_all(b"two").expect("sent");
        assert_eq!(readv(ours.as_fd(), &slices).expect("read"), 3);
        assert_eq!(log().take()[0], 0b11);
        theirs.write_all(b"head, and five").expect("sent");
        let mut head = [0; 9];
        read_frame(ours.as_fd(), &mut head, &slices).expect("read");
        assert_eq!(log().take()[0], 0b11);
        // Nobody knows how far it came.
        preadv(ours.as_fd(), &slices, 0).expect_err("a socket has no place to read from");
        assert_eq!(log().take()[0], 0b1_1111);
    }
}
