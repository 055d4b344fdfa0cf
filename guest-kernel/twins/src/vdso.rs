//! getrandom() of the vDSO (Linux 6.11 on; lib/vdso/getrandom.c), which Debian 12's C
//! library does not know yet.

use std::ffi::{CStr, c_uint, c_void};

/// `__vdso_getrandom`: buffer, length, flags, state, the state's length.
type Function = extern "C" fn(*mut c_void, usize, c_uint, *mut c_void, usize) -> isize;

/// `struct vgetrandom_opaque_params` (include/uapi/linux/random.h).
#[repr(C)]
#[derive(Default)]
struct Params {
    size: u32,
    protection: u32,
    flags: u32,
    reserved: [u32; 13],
}

/// The function, and a state for it.
pub struct Vdso {
    function: Function,
    state: *mut c_void,
    size: usize,
}

impl Vdso {
    /// `None` in a kernel without it.
    pub fn find() -> Option<Self> {
        let address = symbol(c"__vdso_getrandom")?;
        // SAFETY: that function is of this type.
        let function: Function = unsafe { std::mem::transmute(address) };
        let mut params = Params::default();
        let asked = function(
            std::ptr::null_mut(),
            0,
            0,
            (&raw mut params).cast(),
            usize::MAX,
        );
        // SAFETY: a new mapping, as the kernel wants it.
        let state = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                params.protection as i32,
                params.flags as i32,
                -1,
                0,
            )
        };
        let size = params.size as usize;
        (asked == 0 && size <= 4096 && state != libc::MAP_FAILED).then_some(Self {
            function,
            state,
            size,
        })
    }

    pub fn draw(&mut self) -> u64 {
        let mut number = 0_u64;
        let got = (self.function)((&raw mut number).cast(), 8, 0, self.state, self.size);
        assert_eq!(got, 8);
        number
    }
}

/// A function of the vDSO: by its table of dynamic symbols, as any shared object's.
fn symbol(name: &CStr) -> Option<*const c_void> {
    // SAFETY: asks for a number.
    let base = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) } as *const u8;
    if base.is_null() {
        return None;
    }
    // SAFETY: the kernel has mapped an ELF file there, whole: it lies at address 0 of
    // itself, so that offsets in it are offsets from `base`, and what its headers and its
    // dynamic section name is in it.
    unsafe {
        let header = &*base.cast::<libc::Elf64_Ehdr>();
        let segments = base.add(header.e_phoff as usize).cast::<libc::Elf64_Phdr>();
        let dynamic = (0..usize::from(header.e_phnum))
            .map(|i| &*segments.add(i))
            .find(|segment| segment.p_type == libc::PT_DYNAMIC)?;
        let entries = base.add(dynamic.p_vaddr as usize).cast::<[u64; 2]>();
        let entry = |tag: u64| {
            (0..)
                .map(|i| *entries.add(i))
                .take_while(|[t, _]| *t != 0)
                .find_map(|[t, value]| (t == tag).then_some(base.add(value as usize)))
        };
        // DT_STRTAB, DT_SYMTAB; the strings come right after the symbols.
        let (strings, symbols) = (entry(5)?, entry(6)?);
        let count = strings.offset_from(symbols).unsigned_abs() / size_of::<libc::Elf64_Sym>();
        (0..count)
            .map(|i| &*symbols.cast::<libc::Elf64_Sym>().add(i))
            .find(|symbol| CStr::from_ptr(strings.add(symbol.st_name as usize).cast()) == name)
            .map(|symbol| base.add(symbol.st_value as usize).cast())
    }
}
