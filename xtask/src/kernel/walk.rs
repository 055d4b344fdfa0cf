//! `cargo xtask kernel --walk`: what the guest kernel answers to programs, against
//! what Debian's answers.

use crate::agent;
use crate::cpio::Archive;
use crate::host;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// More than the walk takes on a busy machine; its probes have limits of their own.
const LIMIT_SECONDS: &str = "900";

/// Boots `kernel` in QEMU, without KVM, with the walk as PID 1, and fails if it
/// answers otherwise than the reference and the allowed differences say. Prints
/// what it found.
pub fn compare(kernel: &Path) -> Result<()> {
    host::apt_install(&["qemu-system-x86"])?;
    let walk = build()?;
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let initramfs = folder.path().join("initramfs");
    let program = fs::read(&walk).with_context(|| format!("cannot read {}", walk.display()))?;
    let mut archive = Archive::default();
    archive.file("init", 0o755, &program);
    fs::write(&initramfs, archive.finish()).context("cannot write the initramfs")?;
    let measured = folder.path().join("measured");
    boot(kernel, &initramfs, &measured)?;
    let files = host::root().join("guest-kernel/walk");
    let compared = Command::new(&walk)
        .arg("compare")
        .args([&files.join("reference"), &measured, &files.join("allowed")])
        .status()
        .with_context(|| format!("cannot start {}", walk.display()))?;
    if !compared.success() {
        bail!("the guest kernel answers otherwise than guest-kernel/walk/allowed says");
    }
    let entries = fs::read_to_string(&measured).context("cannot read the walk")?;
    let entries = entries.lines().filter(|line| line.contains('\t')).count();
    eprintln!("xtask: {entries} answers as Debian's or as guest-kernel/walk/allowed says");
    Ok(())
}

/// Builds the walk, static: it is the only file in its guest.
pub fn build() -> Result<PathBuf> {
    agent::build_static("vm-run-walk", "walk")
}

/// Runs the guest to its end, with its console in `output`. The machine has what
/// an emulated CPU needs for its clocks (a PIT, an RTC) and nothing else.
fn boot(kernel: &Path, initramfs: &Path, output: &Path) -> Result<()> {
    let console =
        fs::File::create(output).with_context(|| format!("cannot make {}", output.display()))?;
    host::run(
        Command::new("timeout")
            .args([LIMIT_SECONDS, "qemu-system-x86_64"])
            .args(["-accel", "tcg", "-cpu", "max", "-m", "256"])
            .args([
                "-M",
                "microvm,pit=on,pic=on,rtc=on,isa-serial=on,x-option-roms=off",
            ])
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-serial", "stdio"])
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initramfs)
            .args([
                "-append",
                "console=ttyS0 quiet panic=-1 reboot=t random.trust_cpu=on",
            ])
            .stdin(Stdio::null())
            .stdout(console),
    )
    .context("the walk's guest did not end well")
}
