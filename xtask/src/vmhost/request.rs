//! What the emulated host is asked to run, as the shell fragment that its session.sh
//! reads.

use anyhow::{Result, bail};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// One command with all that it sees of its caller.
pub struct Request<'a> {
    /// Program and arguments, at least the program.
    pub argv: &'a [OsString],
    /// The working directory.
    pub directory: &'a Path,
    /// The whole environment.
    pub environment: &'a [(OsString, OsString)],
    /// The host name.
    pub hostname: &'a OsStr,
    /// The kernel package's `lib/modules`.
    pub modules: &'a Path,
    /// Standard input comes over the port; without, it is `/dev/null`.
    pub forward_stdin: bool,
}

impl Request<'_> {
    /// The fragment: settings, and the function `session` that becomes the command.
    pub fn script(&self) -> Result<Vec<u8>> {
        let [program, ..] = self.argv else {
            bail!("no command given");
        };
        if program.as_bytes().contains(&b'=') {
            bail!(
                "the program's name holds an =, which env(1) cannot run: {}",
                program.display()
            );
        }
        let stdin: &str = if self.forward_stdin { "port" } else { "null" };
        let mut script = Vec::new();
        for (name, value) in [
            ("modules", self.modules.as_os_str()),
            ("hostname", self.hostname),
            ("stdin", OsStr::new(stdin)),
        ] {
            script.extend_from_slice(name.as_bytes());
            script.push(b'=');
            quote(value.as_bytes(), &mut script);
            script.push(b'\n');
        }
        script.extend_from_slice(b"session() {\ncd ");
        quote(self.directory.as_os_str().as_bytes(), &mut script);
        // env, because a shell drops variables whose names are not identifiers.
        script.extend_from_slice(b" || exit 126\nexec $b setsid /usr/bin/env -i --");
        for (name, value) in self.environment {
            script.push(b' ');
            quote(
                &[name.as_bytes(), b"=", value.as_bytes()].concat(),
                &mut script,
            );
        }
        for word in self.argv {
            script.push(b' ');
            quote(word.as_bytes(), &mut script);
        }
        script.extend_from_slice(b"\n}\n");
        Ok(script)
    }
}

/// Appends `word` in single quotes, in which the shell takes every byte but `'` as it is.
fn quote(word: &[u8], script: &mut Vec<u8>) {
    script.push(b'\'');
    for &byte in word {
        if byte == b'\'' {
            script.extend_from_slice(br"'\''");
        } else {
            script.push(byte);
        }
    }
    script.push(b'\'');
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// The fragment as the shell on this machine runs it, without setsid and cd's target.
    fn run(argv: &[OsString], environment: &[(OsString, OsString)]) -> Vec<u8> {
        let request = Request {
            argv,
            directory: Path::new("/"),
            environment,
            hostname: OsStr::new("h"),
            modules: Path::new("/m"),
            forward_stdin: false,
        };
        let mut script = b"b=env\nsetsid() { :; }\n".to_vec();
        script.extend(request.script().unwrap());
        script.extend(b"session\n");
        let script = String::from_utf8(script).unwrap().replace("$b setsid ", "");
        let out = Command::new("sh").arg("-c").arg(script).output().unwrap();
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        out.stdout
    }

    #[test]
    fn words_arrive_as_they_were() {
        let argv: Vec<OsString> = [
            "printf",
            "[%s]",
            "it's",
            "$HOME `id` \\ \"",
            "",
            "two\nlines",
        ]
        .map(OsString::from)
        .to_vec();
        assert_eq!(run(&argv, &[]), b"[it's][$HOME `id` \\ \"][][two\nlines]");
    }

    #[test]
    fn the_environment_is_exactly_what_was_asked() {
        let environment = [("A", "1'2"), ("BASH_FUNC_f%%", "() { :; }")]
            .map(|(name, value)| (OsString::from(name), OsString::from(value)));
        let out = run(&["/usr/bin/env".into()], &environment);
        assert_eq!(out, b"A=1'2\nBASH_FUNC_f%%=() { :; }\n");
    }

    #[test]
    fn a_program_that_env_would_take_for_a_variable_is_refused() {
        let request = Request {
            argv: &["a=b".into()],
            directory: Path::new("/"),
            environment: &[],
            hostname: OsStr::new("h"),
            modules: Path::new("/m"),
            forward_stdin: false,
        };
        assert!(request.script().is_err());
    }
}
