//! `cargo xtask demo`: one parent, ten children, two images.

use crate::artifacts::programs;
use crate::vmhost::{self, Options};
use crate::{guest, host, images};
use anyhow::{Context, Result, bail, ensure};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(20 * 60);

/// What each child runs: image, command, and the status it must have.
const CHILDREN: [(&str, &[&str], i32); 10] = [
    (
        "busybox",
        &["echo", "hello from a virtual machine of my own"],
        0,
    ),
    ("busybox", &["hostname"], 0),
    ("busybox", &["sh", "-c", "id; ps"], 0),
    (
        "busybox",
        &["sh", "-c", "head -c 8 /dev/urandom | od -An -tx1"],
        0,
    ),
    (
        "busybox",
        &["sh", "-c", "echo mine > /file; cat /file; exit 7"],
        7,
    ),
    ("busybox", &["sh", "-c", "cat /file 2>&1"], 1),
    (
        "debian-python:bookworm",
        &["python3", "-c", "print(sum(range(1000)))"],
        0,
    ),
    (
        "debian-python:bookworm",
        &["python3", "-c", "import ssl; print(ssl.OPENSSL_VERSION)"],
        0,
    ),
    (
        "debian-python:bookworm",
        &[
            "sh",
            "-c",
            ". /etc/os-release; echo $PRETTY_NAME; uname -sr",
        ],
        0,
    ),
    (
        "debian-python:bookworm",
        &[
            "python3",
            "-c",
            "import secrets; print(secrets.token_hex(8))",
        ],
        0,
    ),
];

/// `cargo xtask demo`
#[derive(clap::Args)]
pub struct Args {
    /// Where the children run: program, guest, then images. `demo` calls itself so,
    /// on a host that can run Linux guests.
    #[arg(long, num_args = 4, value_names = ["PROGRAM", "GUEST", "BUSYBOX", "PYTHON"], hide = true)]
    inside: Option<Vec<PathBuf>>,
}

/// Builds what is needed, and runs the children where KVM can run Linux.
pub fn run(args: &Args) -> Result<()> {
    if let Some([program, guest, images @ ..]) = args.inside.as_deref() {
        return children(program, guest, images);
    }
    let program = programs(&[])?.vm_run;
    let words: [PathBuf; 4] = [
        program,
        guest::ensure()?,
        images::ensure_busybox()?,
        images::ensure_debian_python()?,
    ];
    let this = std::env::current_exe().context("where is xtask?")?;
    let mut argv: Vec<OsString> = vec![this.into(), "demo".into(), "--inside".into()];
    argv.extend(words.map(OsString::from));
    let options = Options {
        timeout: Some(TIMEOUT),
        ..Options::default()
    };
    match vmhost::run_command(&argv, &options)? {
        0 => Ok(()),
        status => bail!("the demo failed with status {status}"),
    }
}

fn children(program: &Path, guest: &Path, images: &[PathBuf]) -> Result<()> {
    let root = tempfile::tempdir().context("cannot make a state directory")?;
    let vm_run = || {
        let mut command = Command::new(program);
        command
            .arg("--root")
            .arg(root.path())
            .env("VM_RUN_GUEST", guest)
            .stdin(Stdio::null());
        command
    };
    for image in images {
        host::run(vm_run().args(["image", "load"]).arg(image))?;
    }
    // On hardware a boot takes a second; the emulated host is slow.
    let started = std::time::Instant::now();
    host::run(vm_run().args(["template", "build", "--boot-timeout", "60"]))?;
    println!(
        "one parent booted and frozen in {:.1?}\n",
        started.elapsed()
    );
    let mut table = Vec::new();
    for (number, (image, command, expected)) in (1..).zip(CHILDREN) {
        let stages = root.path().join("stages.json");
        println!("child {number}: {image} {}", command.join(" "));
        let out = vm_run()
            .args(["run", "--rm", "--stages"])
            .arg(&stages)
            .arg(image)
            .args(command)
            .stderr(Stdio::inherit())
            .output()?;
        for line in String::from_utf8_lossy(&out.stdout).lines() {
            println!("    {line}");
        }
        let status = out.status.code();
        println!("    -> exit status {}", status.unwrap_or(-1));
        ensure!(
            status == Some(expected),
            "child {number} should have ended with {expected}: {}",
            out.status
        );
        table.push(serde_json::from_slice(&std::fs::read(&stages)?)?);
    }
    println!("\nstages, in milliseconds since each child's fork was asked for:");
    print!("{}", stage_table(&table));
    Ok(())
}

/// One column for each child.
fn stage_table(children: &[serde_json::Value]) -> String {
    let mut text = format!("{:<20}", "");
    for number in 1..=children.len() {
        text += &format!("{number:>8}");
    }
    text.push('\n');
    let names = children.first().and_then(|c| c.as_object());
    for name in names.into_iter().flat_map(|o| o.keys()) {
        // A container's supervisor does not tell when it saw the end.
        let is_known = children.iter().any(|child| child[name].is_number());
        if name == "fork_asked" || !is_known {
            continue;
        }
        text += &format!("{name:<20}");
        for child in children {
            let at = child[name].as_f64().zip(child["fork_asked"].as_f64());
            text += &match at {
                Some((at, asked)) => format!("{:>8.1}", (at - asked) / 1000.0),
                None => format!("{:>8}", "-"),
            };
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn stages_count_from_the_fork_and_may_be_missing() {
        let children = [
            json!({ "fork_asked": 1000.0, "vm_made": 3500.0, "first_output": null, "gone": null }),
            json!({ "fork_asked": 0.0, "vm_made": 1000.0, "first_output": 2000.0, "gone": null }),
        ];
        let table = stage_table(&children);
        let rows: Vec<Vec<&str>> = table
            .lines()
            .map(|l| l.split_whitespace().collect())
            .collect();
        assert_eq!(
            rows,
            [
                vec!["1", "2"],
                vec!["vm_made", "2.5", "1.0"],
                vec!["first_output", "-", "2.0"]
            ]
        );
    }
}
