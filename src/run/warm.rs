//! `vm-run run` of a template with a container inside.

use super::{CreateArgs, terminal_env};
use crate::container::{Layer, Spec};
use crate::image::ImageConfig;
use anyhow::{Result, bail};
use fork::{Stream, Warm};
use std::ffi::OsString;

/// Completes the plan for a child of a template with `inside` in it. `line` is the whole
/// command line: only there can it be seen whether a word came after `--`.
///
/// # Errors
/// Anything that is chosen when a container starts.
pub(super) fn plan(
    spec: &mut Spec,
    args: &CreateArgs,
    inside: &Warm,
    line: impl Iterator<Item = OsString>,
) -> Result<()> {
    if let Some(what) = chosen_too_late(args, line) {
        bail!(
            "the container in this template runs already, so {what} cannot be chosen: leave it out (a command to run beside it goes after --)"
        );
    }
    let has_terminal = inside.streams.contains(&Stream::Terminal);
    let goes_on = args.words.is_empty();
    if args.tty && goes_on && !has_terminal {
        bail!("the container in this template has no terminal: leave out -t");
    }
    if inside.has_network {
        spec.network = super::network(args, &ImageConfig::default())?;
    } else if let Some(option) = args.network.given() {
        bail!(
            "{option}: the container in this template has no network: build it with `template build --network`"
        );
    }
    spec.image.clone_from(&inside.image);
    spec.writable = Layer::Inside;
    spec.args.clone_from(&args.words);
    spec.env = terminal_env(args, inside.env.clone());
    spec.cwd.clone_from(&inside.cwd);
    spec.user.clone_from(&inside.user);
    Ok(())
}

/// What was asked for and cannot be had any more.
fn chosen_too_late(
    args: &CreateArgs,
    line: impl Iterator<Item = OsString>,
) -> Option<&'static str> {
    let options = [
        (!args.env.is_empty(), "-e"),
        (!args.env_file.is_empty(), "--env-file"),
        (args.user.is_some(), "-u"),
        (args.workdir.is_some(), "-w"),
        (args.entrypoint.is_some(), "--entrypoint"),
        (args.rootfs.is_some(), "--rootfs"),
        (args.read_only, "--read-only"),
        (
            args.volumes.given().is_some(),
            args.volumes.given().unwrap_or_default(),
        ),
        (args.writable_memory.is_some(), "--writable-memory"),
        (!args.storage_opt.is_empty(), "--storage-opt"),
        (
            !args.words.is_empty() && !follow_dashes(line, args.words.len()),
            "an IMAGE",
        ),
    ];
    options
        .into_iter()
        .find_map(|(is_given, what)| is_given.then_some(what))
        .or_else(|| args.options.given())
        .or_else(|| args.size.given())
}

/// Whether `--` stands before the last `words` words of a command line.
fn follow_dashes(line: impl Iterator<Item = OsString>, words: usize) -> bool {
    let line: Vec<OsString> = line.collect();
    let before = line.len().checked_sub(words + 1);
    before.is_some_and(|at| line[at] == "--")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use fork::Hooks;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        run: CreateArgs,
    }

    fn inside() -> Warm {
        Warm {
            image: "i".into(),
            command: vec!["serve".into()],
            env: vec!["A=1".into()],
            cwd: "/app".into(),
            user: "app".into(),
            streams: vec![Stream::Stdin, Stream::Stdout, Stream::Stderr],
            has_network: false,
            hooks: Hooks::default(),
        }
    }

    fn planned(words: &[&str]) -> Result<Spec> {
        let line = [&["run", "--template", "t"], words].concat();
        let args = Line::parse_from(&line).run;
        let mut spec = super::super::blank(&args, true)?;
        plan(&mut spec, &args, &inside(), line.iter().map(OsString::from))?;
        Ok(spec)
    }

    #[test]
    fn without_a_command_the_container_goes_on() {
        for words in [&[][..], &["-i"], &["--hostname", "h"], &["--"]] {
            let spec = planned(words).expect("planned");
            assert!(spec.args.is_empty());
            assert_eq!((&*spec.image, spec.writable), ("i", Layer::Inside));
        }
        assert!(planned(&["-t"]).is_err(), "it has no terminal");
    }

    #[test]
    fn a_command_after_dashes_runs_beside_it_as_it_does() {
        let spec = planned(&["-i", "--", "ps", "-e", "--", "x"]).expect("planned");
        assert_eq!(spec.args, ["ps", "-e", "--", "x"]);
        assert_eq!(spec.env, ["A=1"]);
        assert_eq!((&*spec.cwd, &*spec.user), ("/app", "app"));
        assert!(spec.stdin && !spec.tty);
        let spec = planned(&["-it", "--", "sh"]).expect("planned");
        assert!(spec.tty);
        assert_eq!(spec.env, ["A=1", "TERM=xterm"]);
    }

    #[test]
    fn what_a_start_decides_is_refused_in_one_line() {
        let cases = [
            (&["busybox"][..], "an IMAGE"),
            (&["busybox", "--", "ls"], "an IMAGE"),
            (&["-e", "A=2"], "-e"),
            (&["-u", "root", "--", "id"], "-u"),
            (&["-w", "/"], "-w"),
            (&["--entrypoint", "sh"], "--entrypoint"),
            (&["--rootfs", "/", "--", "ls"], "--rootfs"),
            (&["--read-only"], "--read-only"),
            (&["-v", "data:/data"], "-v"),
            (&["--mount", "src=data,dst=/data"], "--mount"),
            (&["--writable-memory", "1m"], "--writable-memory"),
            (&["--cap-add", "ALL"], "--cap-add"),
            (&["-m", "64m"], "-m"),
        ];
        for (words, what) in cases {
            let error = planned(words).expect_err("is refused");
            let text = error.to_string();
            assert!(text.contains(&format!("so {what} cannot")), "{text}");
            assert!(!text.contains('\n'), "{text}");
        }
    }
}
