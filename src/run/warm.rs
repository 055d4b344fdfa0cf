//! `vm-run run` of a template with a container inside.

use super::{Plan, RunArgs, Work, hostname, streams, terminal_env};
use anyhow::{Result, bail};
use fork::{Disks, ProcessSpec, Stream, Warm};
use std::ffi::OsString;

/// The plan for a child of a template with `inside` in it. `line` is the whole command
/// line: only there can it be seen whether a word came after `--`.
///
/// # Errors
/// Anything that is chosen when a container starts.
pub(super) fn plan(
    args: &RunArgs,
    inside: &Warm,
    line: impl Iterator<Item = OsString>,
) -> Result<Plan> {
    if let Some(what) = chosen_too_late(args, line) {
        bail!(
            "the container in this template runs already, so {what} cannot be chosen: leave it out (a command to run beside it goes after --)"
        );
    }
    let has_terminal = inside.streams.contains(&Stream::Terminal);
    if args.tty && args.words.is_empty() && !has_terminal {
        bail!("the container in this template has no terminal: leave out -t");
    }
    let work = if args.words.is_empty() {
        Work::GoOn(inside.streams.clone())
    } else {
        let unseen = inside.streams.iter().copied();
        // Nobody has anything to say to it, and its input is not to end.
        let unseen = unseen.filter(|stream| *stream != Stream::Stdin);
        let process = ProcessSpec {
            args: args.words.clone(),
            env: terminal_env(args, inside.env.clone()),
            cwd: inside.cwd.clone(),
            user: inside.user.clone(),
            streams: streams(args),
            window: crate::terminal::window_size(),
        };
        Work::Beside(unseen.collect(), process)
    };
    Ok(Plan {
        hostname: hostname(args)?,
        disks: Disks::default(),
        work,
    })
}

/// What was asked for and cannot be had any more.
fn chosen_too_late(args: &RunArgs, line: impl Iterator<Item = OsString>) -> Option<&'static str> {
    let options = [
        (!args.env.is_empty(), "-e"),
        (args.user.is_some(), "-u"),
        (args.workdir.is_some(), "-w"),
        (args.entrypoint.is_some(), "--entrypoint"),
        (args.rootfs.is_some(), "--rootfs"),
        (args.read_only, "--read-only"),
        (args.writable_memory.is_some(), "--writable-memory"),
        (
            !args.words.is_empty() && !follow_dashes(line, args.words.len()),
            "an IMAGE",
        ),
    ];
    options
        .into_iter()
        .find_map(|(is_given, what)| is_given.then_some(what))
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

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        run: RunArgs,
    }

    fn inside() -> Warm {
        Warm {
            image: "i".into(),
            command: vec!["serve".into()],
            env: vec!["A=1".into()],
            cwd: "/app".into(),
            user: "app".into(),
            streams: vec![Stream::Stdin, Stream::Stdout, Stream::Stderr],
        }
    }

    fn planned(words: &[&str]) -> Result<Work> {
        let line = [&["run", "--template", "t"], words].concat();
        let args = Line::parse_from(&line).run;
        plan(&args, &inside(), line.iter().map(OsString::from)).map(|plan| plan.work)
    }

    #[test]
    fn without_a_command_the_container_goes_on() {
        for words in [&[][..], &["-i"], &["--hostname", "h"], &["--"]] {
            let work = planned(words).expect("planned");
            assert!(matches!(work, Work::GoOn(streams) if streams == inside().streams));
        }
        assert!(planned(&["-t"]).is_err(), "it has no terminal");
    }

    #[test]
    fn a_command_after_dashes_runs_beside_it_as_it_does() {
        let work = planned(&["-i", "--", "ps", "-e", "--", "x"]).expect("planned");
        let Work::Beside(unseen, process) = work else {
            panic!("it is a command");
        };
        assert_eq!(unseen, [Stream::Stdout, Stream::Stderr]);
        assert_eq!(process.args, ["ps", "-e", "--", "x"]);
        assert_eq!(process.env, ["A=1"]);
        assert_eq!((&*process.cwd, &*process.user), ("/app", "app"));
        assert!(process.streams.contains(&Stream::Stdin));
        let Work::Beside(_, process) = planned(&["-it", "--", "sh"]).expect("planned") else {
            panic!("it is a command");
        };
        assert_eq!(process.streams, [Stream::Terminal]);
        assert_eq!(process.env, ["A=1", "TERM=xterm"]);
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
            (&["--writable-memory", "1m"], "--writable-memory"),
        ];
        for (words, what) in cases {
            let Err(error) = planned(words) else {
                panic!("{words:?} is refused");
            };
            let text = error.to_string();
            assert!(text.contains(&format!("so {what} cannot")), "{text}");
            assert!(!text.contains('\n'), "{text}");
        }
    }
}
