//! The emulated host's kernel and initramfs: made from Debian's packages once, kept
//! in the cache.

use super::{HostKernel, modules};
use crate::cpio::Archive;
use crate::host;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Parts of the keys: raised when what is made of the same inputs changes.
const KERNEL_RECIPE: &[u8] = b"1";
const INITRAMFS_RECIPE: &[u8] = b"2";

/// The packages that the emulated host is made of and runs on.
const PACKAGES: &[&str] = &[
    "qemu-system-x86",
    "busybox-static",
    "kmod",
    "xz-utils",
    "zstd",
];
/// What those packages bring, by which their presence is seen faster than dpkg says it.
const PROGRAMS: &[&str] = &["qemu-system-x86_64", "busybox", "depmod", "xz", "zstd"];

/// Loaded at boot. All others are loaded by modprobe or by the kernel at first use.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "qemu_fw_cfg",
    "9pnet_virtio",
    "9p",
    "overlay",
    "kvm_amd",
];

const INIT: &str = include_str!("init.sh");
const SESSION: &str = include_str!("session.sh");

/// What QEMU boots.
pub struct Image {
    /// The uncompressed kernel: decompressing it under emulation would take seconds.
    pub vmlinux: PathBuf,
    /// The initramfs, uncompressed for the same reason.
    pub initramfs: PathBuf,
    /// The package's `lib/modules`.
    pub modules: PathBuf,
}

impl Image {
    /// Finds the image in the cache, or makes it: installs packages, downloads the
    /// kernel. Processes that need it at the same time wait for the first.
    pub fn prepare(kernel: HostKernel) -> Result<Image> {
        let cache = host::cache_dir()?.join("vmhost");
        fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
        let lock_path = cache.join("lock");
        let lock = fs::File::create(&lock_path)
            .with_context(|| format!("cannot open {}", lock_path.display()))?;
        lock.lock()
            .with_context(|| format!("cannot lock {}", lock_path.display()))?;

        install_programs()?;
        let package = kernel.package();
        let tree = cache.join(format!(
            "linux-{}-{}",
            kernel.name(),
            host::key(&[KERNEL_RECIPE, package.as_bytes()])
        ));
        make_once(&tree, |beside| unpack_kernel(package, beside))?;
        let release = release(&tree)?;
        let initramfs_key = host::key(&[
            INITRAMFS_RECIPE,
            tree.as_os_str().as_encoded_bytes(),
            release.as_bytes(),
            INIT.as_bytes(),
            SESSION.as_bytes(),
            MODULES.join(" ").as_bytes(),
        ]);
        let initramfs = cache.join(format!("initramfs-{}-{initramfs_key}", kernel.name()));
        make_once(&initramfs, |beside| {
            let archive = initramfs_archive(&tree, &release)?;
            fs::write(beside, archive).with_context(|| format!("cannot write {}", beside.display()))
        })?;
        Ok(Image {
            vmlinux: tree.join("vmlinux"),
            initramfs,
            modules: tree.join("lib/modules"),
        })
    }
}

/// The emulated host's own kernel as Debian ships it: a bzImage whose drivers are
/// modules. Made first if need be.
pub fn stock_kernel(kernel: HostKernel) -> Result<PathBuf> {
    let image = Image::prepare(kernel)?;
    let tree = image.vmlinux.parent().unwrap_or(Path::new("."));
    Ok(tree.join(format!("boot/vmlinuz-{}", release(tree)?)))
}

/// Makes `target` beside itself and renames it, so that it is whole or absent. The
/// caller holds the cache's lock.
fn make_once(target: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if target.exists() {
        return Ok(());
    }
    let mut beside = target.as_os_str().to_owned();
    beside.push(".part");
    let beside = PathBuf::from(beside);
    if beside.is_dir() {
        // Left by a process that was killed.
        fs::remove_dir_all(&beside)
            .with_context(|| format!("cannot remove {}", beside.display()))?;
    }
    make(&beside)?;
    fs::rename(&beside, target).with_context(|| format!("cannot make {}", target.display()))
}

/// Installs what is missing; says what to install where it cannot.
fn install_programs() -> Result<()> {
    if PROGRAMS
        .iter()
        .all(|program| find_program(program).is_some())
    {
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() || find_program("apt-get").is_none() {
        bail!(
            "the emulated host needs these Debian packages, to be installed by root: {}",
            PACKAGES.join(" ")
        );
    }
    host::apt_install(PACKAGES)
}

/// The file that a shell with root's usual path would start.
fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// Downloads the kernel that `package` (a meta package) stands for and unpacks it into
/// `tree`, with depmod's files, the uncompressed kernel and this machine's busybox.
fn unpack_kernel(package: &str, tree: &Path) -> Result<()> {
    eprintln!("vmhost: fetching and unpacking the kernel of {package} (once)");
    fs::create_dir_all(tree).with_context(|| format!("cannot make {}", tree.display()))?;
    let deb = match download_kernel(package, tree) {
        Ok(deb) => deb,
        Err(error) => {
            // apt's lists may be absent, or older than what the archive still has.
            eprintln!("vmhost: {error:#}; trying again with new package lists");
            host::run(
                Command::new("apt-get")
                    .args(["-qq", "update"])
                    .stdout(Stdio::null()),
            )?;
            download_kernel(package, tree)?
        }
    };
    host::run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(tree))?;
    fs::remove_file(&deb).with_context(|| format!("cannot remove {}", deb.display()))?;

    let busybox = find_program("busybox").context("busybox is missing (package busybox-static)")?;
    fs::copy(&busybox, tree.join("busybox"))
        .with_context(|| format!("cannot copy {}", busybox.display()))?;
    let release = release(tree)?;
    let depmod = find_program("depmod").context("depmod is missing (package kmod)")?;
    host::run(Command::new(depmod).arg("-b").arg(tree).arg(&release))?;
    let bzimage_path = tree.join(format!("boot/vmlinuz-{release}"));
    let bzimage = fs::read(&bzimage_path)
        .with_context(|| format!("cannot read {}", bzimage_path.display()))?;
    decompress_payload(bzimage_payload(&bzimage)?, tree)
}

/// Downloads the package that `meta` depends on into `tree`; returns its file.
fn download_kernel(meta: &str, tree: &Path) -> Result<PathBuf> {
    let real = real_package(meta)?;
    let version = host::apt_candidate(&real)?;
    host::apt_download(&real, &version, tree)
}

/// The versioned package that the meta package depends on.
fn real_package(meta: &str) -> Result<String> {
    let out = Command::new("apt-cache")
        .args(["depends", meta])
        .env("LC_ALL", "C")
        .output()
        .context("cannot start apt-cache; the emulated host is made of Debian's packages")?;
    real_package_of(&String::from_utf8_lossy(&out.stdout))
        .map(str::to_owned)
        .with_context(|| format!("apt knows no package {meta}"))
}

/// The kernel image in what `apt-cache depends` prints of a meta package.
fn real_package_of(depends: &str) -> Option<&str> {
    depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
}

/// The kernel release in an unpacked kernel package: the one folder of its `lib/modules`.
fn release(tree: &Path) -> Result<String> {
    let dir = find_entry(&tree.join("lib/modules"), "")?;
    let name = dir.file_name().and_then(|name| name.to_str());
    Ok(name.context("the kernel's release is no UTF-8")?.to_owned())
}

/// The first entry of `dir` whose name begins with `prefix`.
fn find_entry(dir: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot read {}", dir.display()))?;
        if entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(prefix.as_bytes())
        {
            return Ok(entry.path());
        }
    }
    bail!("nothing in {} begins with \"{prefix}\"", dir.display())
}

/// The compressed kernel inside a bzImage, without the length that Linux's build
/// appends (Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length).
fn bzimage_payload(image: &[u8]) -> Result<&[u8]> {
    let word = |at: usize| -> Option<usize> {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    if image.get(0x202..0x206) != Some(b"HdrS".as_slice()) {
        bail!("the kernel is no bzImage");
    }
    let setup_sectors = match image[0x1f1] {
        0 => 4,
        count => usize::from(count),
    };
    let payload = || {
        let start = (setup_sectors + 1) * 512 + word(0x248)?;
        let payload = image.get(start..)?.get(..word(0x24c)?)?;
        payload.get(..payload.len().checked_sub(4)?)
    };
    payload().context("the bzImage's payload lies outside it")
}

/// Writes `tree/vmlinux` from the payload.
fn decompress_payload(payload: &[u8], tree: &Path) -> Result<()> {
    let program = match payload {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => "xz",
        _ => bail!("the kernel is compressed neither by zstd nor by xz"),
    };
    let compressed = tree.join("vmlinux.compressed");
    fs::write(&compressed, payload)
        .with_context(|| format!("cannot write {}", compressed.display()))?;
    let vmlinux = tree.join("vmlinux");
    let out =
        fs::File::create(&vmlinux).with_context(|| format!("cannot make {}", vmlinux.display()))?;
    host::run(
        Command::new(program)
            .arg("-dc")
            .arg(&compressed)
            .stdout(out),
    )?;
    fs::remove_file(&compressed).with_context(|| format!("cannot remove {}", compressed.display()))
}

/// The initramfs with the busybox of `tree`, the scripts and the kernel's modules.
fn initramfs_archive(tree: &Path, release: &str) -> Result<Vec<u8>> {
    let module_tree = tree.join("lib/modules").join(release);
    let read = |path: &Path| {
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
    };
    let dep = read(&module_tree.join("modules.dep"))?;
    let builtin = read(&module_tree.join("modules.builtin"))?;

    let mut archive = Archive::default();
    archive.directory("bin");
    let busybox = tree.join("busybox");
    let contents =
        fs::read(&busybox).with_context(|| format!("cannot read {}", busybox.display()))?;
    archive.file("bin/busybox", 0o755, &contents);
    archive.file("init", 0o755, INIT.as_bytes());
    archive.file("session.sh", 0o644, SESSION.as_bytes());
    archive.directory("modules");
    let mut order = String::new();
    for file in modules::load_order(MODULES, &dep, &builtin)? {
        let name = format!("{}.ko", modules::module_name(file));
        let contents = read_module(&module_tree.join(file))?;
        archive.file(&format!("modules/{name}"), 0o644, &contents);
        order.push_str(&name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    Ok(archive.finish())
}

/// A module as the initramfs has it: decompressed, and without its signature, since
/// verifying the signatures takes half of the modules' loading time under emulation.
fn read_module(path: &Path) -> Result<Vec<u8>> {
    let mut module = if path.extension().is_some_and(|extension| extension == "xz") {
        let out = Command::new("xz")
            .arg("-dc")
            .arg(path)
            .output()
            .context("cannot start xz")?;
        if !out.status.success() {
            bail!("xz -dc {}: {}", path.display(), out.status);
        }
        out.stdout
    } else {
        fs::read(path).with_context(|| format!("cannot read {}", path.display()))?
    };
    module.truncate(unsigned_length(&module));
    Ok(module)
}

/// The length of a module without the signature that may follow it: the signature, a
/// `struct module_signature` of 12 bytes that ends with the signature's length in big
/// endian, and a marker (Linux: include/linux/module_signature.h).
fn unsigned_length(module: &[u8]) -> usize {
    const MARKER: &[u8] = b"~Module signature appended~\n";
    const HEADER: usize = 12;
    let unsigned = || {
        let (_, length) = module.strip_suffix(MARKER)?.split_last_chunk::<4>()?;
        let signature = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        module
            .len()
            .checked_sub(MARKER.len() + HEADER)?
            .checked_sub(signature)
    };
    unsigned().unwrap_or(module.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage of `sectors` setup sectors with `payload` 16 bytes behind them.
    fn bzimage(sectors: u8, payload: &[u8]) -> Vec<u8> {
        let start = (usize::from(sectors) + 1) * 512 + 16;
        let mut image = vec![0; start];
        image[0x1f1] = sectors;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    #[test]
    fn the_payload_is_found_without_its_length() {
        let image = bzimage(39, b"compressed....");
        assert_eq!(bzimage_payload(&image).unwrap(), b"compressed");
    }

    #[test]
    fn a_cut_or_foreign_image_is_refused() {
        let mut image = bzimage(39, b"compressed....");
        image.pop();
        assert!(bzimage_payload(&image).is_err());
        assert!(bzimage_payload(b"\x7fELF").is_err());
    }

    #[test]
    fn a_meta_package_stands_for_the_image_it_depends_on() {
        let depends =
            "linux-image-amd64\n  Depends: linux-base\n  Depends: linux-image-6.1.0-56-amd64\n";
        assert_eq!(real_package_of(depends), Some("linux-image-6.1.0-56-amd64"));
        assert_eq!(real_package_of("linux-image-amd64\n"), None);
    }

    #[test]
    fn a_signature_is_cut_off_and_nothing_else() {
        let mut module = b"\x7fELFmodule".to_vec();
        assert_eq!(unsigned_length(&module), module.len());
        let length = module.len();
        module.extend_from_slice(b"signature");
        module.extend_from_slice(&[0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
        module.extend_from_slice(b"~Module signature appended~\n");
        assert_eq!(unsigned_length(&module), length);
        // A length that cannot be is no signature.
        assert_eq!(
            unsigned_length(&module[length + 9..]),
            module.len() - length - 9
        );
    }
}
