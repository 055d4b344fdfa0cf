//! `image import --change`: those instructions of a Dockerfile that say how a
//! container starts.

use super::error::{ImageError, Result};
use serde::Serialize;
use std::collections::BTreeMap;

/// The `config` object of an image's configuration, as instructions make it.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct StartConfig {
    #[serde(skip_serializing_if = "Option::is_none")]
    cmd: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    entrypoint: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    env: Vec<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    exposed_ports: BTreeMap<String, Nothing>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    labels: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    stop_signal: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    user: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    volumes: BTreeMap<String, Nothing>,
    #[serde(skip_serializing_if = "String::is_empty")]
    working_dir: String,
}

/// `{}`: docker's sets are objects.
#[derive(Debug, Serialize)]
struct Nothing {}

impl StartConfig {
    /// Applies one instruction.
    ///
    /// # Errors
    /// [`ImageError::Change`] for an instruction that changes more than this, and for
    /// one that is malformed.
    pub fn apply(&mut self, change: &str) -> Result<()> {
        self.try_apply(change).map_err(|reason| ImageError::Change {
            change: change.to_owned(),
            reason,
        })
    }

    fn try_apply(&mut self, change: &str) -> Result<(), &'static str> {
        let (instruction, rest) = change
            .trim()
            .split_once(char::is_whitespace)
            .ok_or("an instruction and its value are needed")?;
        let rest = rest.trim();
        match instruction.to_ascii_uppercase().as_str() {
            "CMD" => self.cmd = Some(command(rest)),
            "ENTRYPOINT" => self.entrypoint = Some(command(rest)),
            "USER" => self.user = rest.to_owned(),
            "STOPSIGNAL" => self.stop_signal = rest.to_owned(),
            "WORKDIR" if rest.starts_with('/') => self.working_dir = rest.to_owned(),
            "WORKDIR" => return Err("the directory is not absolute"),
            "ENV" => {
                for (name, value) in pairs(rest)? {
                    self.set_env(&name, &value);
                }
            }
            "LABEL" => self.labels.extend(pairs(rest)?),
            "EXPOSE" => {
                let port = |port: String| match port.contains('/') {
                    true => port,
                    false => port + "/tcp",
                };
                let ports = words(rest)?;
                self.exposed_ports
                    .extend(ports.into_iter().map(|word| (port(word), Nothing {})));
            }
            "VOLUME" => {
                let paths = match list(rest) {
                    Some(paths) => paths,
                    None => words(rest)?,
                };
                self.volumes
                    .extend(paths.into_iter().map(|path| (path, Nothing {})));
            }
            _ => {
                return Err(
                    "it is none of CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, \
                     VOLUME and WORKDIR",
                );
            }
        }
        Ok(())
    }

    /// A variable that is there already gets another value.
    fn set_env(&mut self, name: &str, value: &str) {
        self.env
            .retain(|entry| entry.split_once('=').is_none_or(|(other, _)| other != name));
        self.env.push(format!("{name}={value}"));
    }
}

/// The exec form (a JSON array), or the shell form, which a shell runs.
fn command(rest: &str) -> Vec<String> {
    list(rest).unwrap_or_else(|| vec!["/bin/sh".into(), "-c".into(), rest.into()])
}

fn list(rest: &str) -> Option<Vec<String>> {
    serde_json::from_str(rest).ok()
}

fn words(rest: &str) -> Result<Vec<String>, &'static str> {
    shlex::split(rest).ok_or("a quote is not closed")
}

/// `NAME=VALUE...`, or the old `NAME VALUE`.
fn pairs(rest: &str) -> Result<Vec<(String, String)>, &'static str> {
    let words = words(rest)?;
    let pair = |word: &String| {
        let (name, value) = word.split_once('=')?;
        (!name.is_empty()).then(|| (name.to_owned(), value.to_owned()))
    };
    let all: Option<Vec<_>> = words.iter().map(pair).collect();
    match (all, rest.split_once(char::is_whitespace)) {
        (Some(all), _) => Ok(all),
        (None, Some((name, value))) if !name.contains('=') => {
            Ok(vec![(name.to_owned(), value.trim().to_owned())])
        }
        _ => Err("NAME=VALUE is needed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_instruction_sets_its_field() {
        let mut config = StartConfig::default();
        for change in [
            r#"CMD ["sh", "-c", "true"]"#,
            "entrypoint exec /init $A",
            r#"ENV A=1 B="two words""#,
            "ENV A=3",
            "ENV C the rest of the line",
            "EXPOSE 80 53/udp",
            "LABEL org.example=x",
            "STOPSIGNAL SIGINT",
            "USER app:app",
            "VOLUME /data /log",
            r#"VOLUME ["/json"]"#,
            "WORKDIR /srv",
        ] {
            config.apply(change).unwrap();
        }
        let expected = json!({
            "Cmd": ["sh", "-c", "true"],
            "Entrypoint": ["/bin/sh", "-c", "exec /init $A"],
            "Env": ["B=two words", "A=3", "C=the rest of the line"],
            "ExposedPorts": { "53/udp": {}, "80/tcp": {} },
            "Labels": { "org.example": "x" },
            "StopSignal": "SIGINT",
            "User": "app:app",
            "Volumes": { "/data": {}, "/json": {}, "/log": {} },
            "WorkingDir": "/srv",
        });
        assert_eq!(serde_json::to_value(&config).unwrap(), expected);
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        for change in [
            "",
            "CMD",
            "RUN make",
            "ENV A",
            "ENV =x",
            r#"ENV A="x"#,
            "WORKDIR srv",
        ] {
            let refusal = StartConfig::default().apply(change);
            assert!(
                matches!(refusal, Err(ImageError::Change { .. })),
                "{change}"
            );
        }
    }
}
