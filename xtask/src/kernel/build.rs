//! One kernel build: unpack, patch, configure, compile, keep the result.

use super::{Flavour, Recipe, config};
use crate::host;
use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Builds what the recipe says in `tree` and leaves in `out` the image, and
/// beside it the `config` and `System.map` that belong to it.
pub fn build(recipe: &Recipe, tree: &Path, out: &Path) -> Result<()> {
    let target = recipe.flavour.target();
    eprintln!("xtask: building {target} from {}", recipe.source.identity());
    let start = Instant::now();
    recipe.source.unpack(tree)?;
    for patch in &recipe.patches {
        let input =
            File::open(patch).with_context(|| format!("cannot open {}", patch.display()))?;
        host::run(
            Command::new("patch")
                .args(["-p1", "--quiet", "--forward"])
                .current_dir(tree)
                .stdin(input),
        )
        .with_context(|| format!("{} does not apply", patch.display()))?;
    }
    configure(recipe, tree)?;
    compile(recipe, tree)?;
    let image = out.join(target);
    copy(&tree.join(recipe.flavour.image()), &image)?;
    copy(&tree.join(".config"), &out.join("config"))?;
    copy(&tree.join("System.map"), &out.join("System.map"))?;
    if recipe.flavour == Flavour::Pico {
        // System.map keeps the symbols.
        host::run(Command::new("strip").arg("--strip-all").arg(&image))?;
    }
    let size = fs::metadata(&image)
        .map(|meta| meta.len())
        .unwrap_or_default();
    eprintln!(
        "xtask: {target} built in {} s, {:.1} MB",
        start.elapsed().as_secs(),
        size as f64 / 1e6
    );
    Ok(())
}

/// Makes the final `.config`, and fails if Kconfig did not grant every demand.
fn configure(recipe: &Recipe, tree: &Path) -> Result<()> {
    let demands = tree.join("demands.config");
    let write = |path: &Path, text: &str| {
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    match recipe.flavour {
        Flavour::Pico => {
            write(&demands, &recipe.demands)?;
            host::run(
                make(tree)
                    .arg("allnoconfig")
                    .env("KCONFIG_ALLCONFIG", &demands)
                    .stdout(Stdio::null()),
            )?;
        }
        Flavour::Debian => {
            // Of two lines for an option Kconfig takes the last.
            write(
                &tree.join(".config"),
                &format!("{}\n{}", recipe.base, recipe.demands),
            )?;
            // It warns of every option that is set twice, and nothing is amiss.
            host::run(
                make(tree)
                    .arg("olddefconfig")
                    .stdout(Stdio::null())
                    .stderr(Stdio::null()),
            )?;
        }
    }
    let path = tree.join(".config");
    let granted =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let unmet = config::unmet(&recipe.demands, &granted);
    if !unmet.is_empty() {
        bail!(
            "Kconfig did not grant what was asked:\n  {}",
            unmet.join("\n  ")
        );
    }
    if recipe.flavour == Flavour::Pico {
        let missing = config::not_built_in(config::MOBY_NECESSARY, &granted);
        if !missing.is_empty() {
            bail!("containers need these built in: {}", missing.join(" "));
        }
    }
    Ok(())
}

/// Compiles, with a bar that counts objects on a terminal and silence in a pipe.
fn compile(recipe: &Recipe, tree: &Path) -> Result<()> {
    let log_path = tree.join("build.log");
    let mut log =
        File::create(&log_path).with_context(|| format!("cannot make {}", log_path.display()))?;
    let jobs = std::thread::available_parallelism().map_or(1, |n| n.get());
    let errors = log.try_clone().context("cannot share the build's log")?;
    let mut child = make(tree)
        .arg(format!("-j{jobs}"))
        .arg(recipe.flavour.target())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()
        .context("cannot start make")?;
    let bar = progress(recipe.flavour.objects());
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).lines() {
            let line = line.context("cannot read make's output")?;
            writeln!(log, "{line}").context("cannot write the build's log")?;
            if let Some(object) = object(&line) {
                bar.inc(1);
                if bar.position() > bar.length().unwrap_or_default() {
                    bar.inc_length(1);
                }
                bar.set_message(object.to_owned());
            }
        }
    }
    bar.finish_and_clear();
    let status = child.wait().context("cannot wait for make")?;
    if !status.success() {
        let text = fs::read(&log_path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        eprintln!("{}", lines[lines.len().saturating_sub(20)..].join("\n"));
        bail!(
            "make failed ({status}); all its output is in {}",
            log_path.display()
        );
    }
    Ok(())
}

fn progress(objects: u64) -> ProgressBar {
    let bar = ProgressBar::new(objects);
    if let Ok(style) =
        ProgressStyle::with_template("kernel {wide_bar} {pos}/~{len} objects, {elapsed} {msg:32!}")
    {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_secs(1));
    bar
}

/// The object that a line of make's output says is being made.
fn object(line: &str) -> Option<&str> {
    let mut words = line.split_whitespace();
    let (step, object) = (words.next()?, words.next()?);
    matches!(step, "CC" | "AS").then_some(object)
}

/// `make` in the tree, with all that could differ from host to host held still.
fn make(tree: &Path) -> Command {
    let mut make = Command::new("make");
    make.arg("-C")
        .arg(tree)
        .args(["--no-print-directory", "ARCH=x86_64"]);
    make.env("LC_ALL", "C")
        .env("KBUILD_BUILD_USER", "vm-run")
        .env("KBUILD_BUILD_HOST", "vm-run")
        .env("KBUILD_BUILD_TIMESTAMP", "@0")
        .env("KBUILD_BUILD_VERSION", "1")
        .env_remove("MAKEFLAGS");
    make
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::object;

    #[test]
    fn objects_are_counted_and_other_steps_are_not() {
        assert_eq!(object("  CC      kernel/fork.o"), Some("kernel/fork.o"));
        assert_eq!(
            object("  AS      arch/x86/entry/entry_64.o"),
            Some("arch/x86/entry/entry_64.o")
        );
        assert_eq!(object("  AR      kernel/built-in.a"), None);
        assert_eq!(object(""), None);
    }
}
