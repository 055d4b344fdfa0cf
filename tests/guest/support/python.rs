//! A warm child in which Python evaluates what it is told.

use super::PATIENCE;
use fork::{Child, ForkSpec, Stream, Template};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

/// A child, and a conversation with the Python in it.
pub struct Python {
    pub child: Child,
    pub stdin: UnixStream,
    stdout: BufReader<UnixStream>,
}

impl Python {
    pub fn of(mut child: Child) -> Self {
        let attached = child.attach(&[Stream::Stdin, Stream::Stdout]);
        let streams = attached.expect("attaches");
        let stdout = streams.stdout.expect("was asked for");
        stdout.set_read_timeout(Some(PATIENCE)).expect("set");
        Self {
            child,
            stdin: streams.stdin.expect("was asked for"),
            stdout: BufReader::new(stdout),
        }
    }

    pub fn fork(template: &Template, spec: ForkSpec) -> Self {
        Self::of(template.fork(spec).expect("forks"))
    }

    pub fn say(&mut self, line: &str) {
        writeln!(self.stdin, "{line}").expect("it reads");
    }

    pub fn hear(&mut self) -> String {
        let mut answer = String::new();
        self.stdout.read_line(&mut answer).expect("it answers");
        answer.trim_end().to_owned()
    }

    pub fn ask(&mut self, expression: &str) -> String {
        self.say(expression);
        self.hear()
    }
}
