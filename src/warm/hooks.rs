//! What is done in a warm container before it is frozen, and in each child: said on the
//! command line, or by the image.

use super::words;
use crate::container::parse_signal;
use anyhow::Result;
use clap::value_parser;
use fork::{Hook, Hooks};
use std::collections::BTreeMap;

/// The labels of an image that say so.
const PRE_FREEZE: &str = "vm-run.hook.pre-freeze";
const POST_FORK: &str = "vm-run.hook.post-fork";

/// The hooks of the container inside a template.
#[derive(Debug, clap::Args)]
pub struct HookArgs {
    /// A command that runs in the container before it is frozen, written as for --warm;
    /// if it fails, nothing is frozen [default: the image's label vm-run.hook.pre-freeze]
    #[arg(long, value_name = "CMD", requires = "warm")]
    pre_freeze: Option<String>,
    /// Or a signal to its first process
    #[arg(
        long,
        value_name = "SIGNAL",
        requires = "warm",
        conflicts_with = "pre_freeze"
    )]
    pre_freeze_signal: Option<String>,
    /// A command that runs in the container in each child, as soon as the child is itself;
    /// if it fails, so does the child [default: the image's label vm-run.hook.post-fork]
    #[arg(long, value_name = "CMD", requires = "warm")]
    post_fork: Option<String>,
    /// Or a signal to its first process
    #[arg(
        long,
        value_name = "SIGNAL",
        requires = "warm",
        conflicts_with = "post_fork"
    )]
    post_fork_signal: Option<String>,
    /// How long such a command may take, in seconds
    #[arg(long, value_name = "SECONDS", requires = "warm", default_value = "30",
        value_parser = value_parser!(u32).range(1..=3600))]
    hook_timeout: u32,
}

/// What is asked for, or else what the image's labels say.
///
/// # Errors
/// A signal that is none.
pub fn chosen(args: &HookArgs, labels: &BTreeMap<String, String>) -> Result<Hooks> {
    let hook = |command: &Option<String>, signal: &Option<String>, label| -> Result<_> {
        if let Some(signal) = signal {
            return Ok(Some(Hook::Signal(parse_signal(signal)?)));
        }
        let line = command.as_ref().or_else(|| labels.get(label));
        // An empty one is none, whatever the image says.
        let line = line.filter(|line| !line.is_empty());
        Ok(line.map(|line| Hook::Command(words(line))))
    };
    Ok(Hooks {
        pre_freeze: hook(&args.pre_freeze, &args.pre_freeze_signal, PRE_FREEZE)?,
        post_fork: hook(&args.post_fork, &args.post_fork_signal, POST_FORK)?,
        limit_ms: args.hook_timeout * 1000,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[arg(long)]
        warm: Option<String>,
        #[command(flatten)]
        hooks: HookArgs,
    }

    fn hooks(words: &[&str], labels: &[(&str, &str)]) -> Result<Hooks> {
        let line = [&["build", "--warm", "x"], words].concat();
        let line = Line::try_parse_from(line)?;
        assert!(line.warm.is_some());
        let labels = labels.iter().map(|(k, v)| ((*k).into(), (*v).into()));
        chosen(&line.hooks, &labels.collect())
    }

    fn command(words: &[&str]) -> Option<Hook> {
        Some(Hook::Command(words.iter().map(|&w| w.into()).collect()))
    }

    #[test]
    fn the_command_line_goes_before_the_image() {
        let labels = [(POST_FORK, r#"["renew", "all"]"#), ("other", "x")];
        let none = hooks(&[], &[]).expect("none");
        assert_eq!((none.pre_freeze, none.post_fork), (None, None));
        let image = hooks(&[], &labels).expect("the image's");
        assert_eq!(image.post_fork, command(&["renew", "all"]));
        assert_eq!(image.limit_ms, 30_000);
        let own = ["--post-fork", "renew it", "--pre-freeze-signal", "usr1"];
        let own = hooks(&own, &labels).expect("its own");
        assert_eq!(own.post_fork, command(&["/bin/sh", "-c", "renew it"]));
        assert_eq!(own.pre_freeze, Some(Hook::Signal(10)));
        let off = hooks(&["--post-fork", ""], &labels).expect("none");
        assert_eq!(off.post_fork, None);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for words in [
            &["--post-fork", "x", "--post-fork-signal", "HUP"][..],
            &["--post-fork-signal", "no-such"],
            &["--hook-timeout", "0"],
            &["--hook-timeout", "soon"],
        ] {
            assert!(hooks(words, &[]).is_err(), "{words:?}");
        }
    }
}
