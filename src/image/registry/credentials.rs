//! Who the user is to a registry, by docker's `config.json`: its `auths`, and the
//! programs that it names for others (docker-credential-helpers' protocol).

use crate::image::error::{ImageError, Result, printable};
use base64::Engine;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What docker.io is called in the file.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";
/// A user's name that says that the password is a token of OAuth.
const TOKEN_USER: &str = "<token>";

/// A user's name and password.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    /// The name.
    pub user: String,
    /// The password, or an access token in its place.
    pub password: String,
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Login({:?})", self.user)
    }
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct File {
    auths: BTreeMap<String, Entry>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
}

/// The login for a registry; `None` when the user has none.
///
/// # Errors
/// [`ImageError::Credentials`] for a file or a helper that cannot be used.
pub fn find(domain: &str) -> Result<Option<Login>> {
    let Some(path) = file() else {
        return Ok(None);
    };
    let bytes = match std::fs::read(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unusable(&path, &error.to_string())),
        Ok(bytes) => bytes,
    };
    let file: File =
        serde_json::from_slice(&bytes).map_err(|error| unusable(&path, &error.to_string()))?;
    file.login(domain)
        .map_err(|reason| unusable(&path, &reason))
}

fn file() -> Option<PathBuf> {
    let folder = match std::env::var_os("DOCKER_CONFIG") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(&std::env::var_os("HOME")?).join(".docker"),
    };
    Some(folder.join("config.json"))
}

fn unusable(path: &Path, reason: &str) -> ImageError {
    ImageError::Credentials {
        file: path.display().to_string(),
        reason: printable(reason.as_bytes()),
    }
}

impl File {
    /// Helpers come first, as in docker.
    fn login(&self, domain: &str) -> Result<Option<Login>, String> {
        let helper = self.cred_helpers.get(domain).unwrap_or(&self.creds_store);
        if !helper.is_empty() {
            let server = if domain == "docker.io" {
                DOCKER_HUB
            } else {
                domain
            };
            return ask(helper, server);
        }
        let entry = self.auths.iter().find(|(key, _)| host(key) == domain);
        match entry {
            Some((key, entry)) => entry.login().map_err(|reason| format!("{key}: {reason}")),
            None => Ok(None),
        }
    }
}

impl Entry {
    fn login(&self) -> Result<Option<Login>, &'static str> {
        if !self.identitytoken.is_empty() {
            return Err("identity tokens are not supported");
        }
        if self.auth.is_empty() {
            return Ok((!self.username.is_empty()).then(|| Login {
                user: self.username.clone(),
                password: self.password.clone(),
            }));
        }
        const BAD: &str = "its auth is not the base64 of user:password";
        let decoded = base64::engine::general_purpose::STANDARD
            .decode(&self.auth)
            .map_err(|_| BAD)?;
        let text = String::from_utf8(decoded).map_err(|_| BAD)?;
        let (user, password) = text.split_once(':').ok_or(BAD)?;
        Ok(Some(Login {
            user: user.to_owned(),
            // docker pads with NULs.
            password: password.trim_end_matches('\0').to_owned(),
        }))
    }
}

/// The registry that a key of `auths` means: old ones are URLs.
fn host(key: &str) -> &str {
    let rest = key
        .strip_prefix("https://")
        .or_else(|| key.strip_prefix("http://"))
        .unwrap_or(key);
    match rest.split('/').next() {
        Some("index.docker.io") => "docker.io",
        Some(host) => host,
        None => rest,
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

/// Asks the program `docker-credential-HELPER`.
fn ask(helper: &str, server: &str) -> Result<Option<Login>, String> {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if !helper.bytes().all(is_plain) {
        return Err("the name of its credential helper is none".to_owned());
    }
    let program = format!("docker-credential-{helper}");
    let failed = |error: std::io::Error| format!("{program}: {error}");
    let mut child = Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(server.as_bytes()).map_err(failed)?;
    }
    let out = child.wait_with_output().map_err(failed)?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stdout);
        if said.contains("credentials not found") {
            return Ok(None);
        }
        return Err(format!("{program}: {}: {}", out.status, said.trim()));
    }
    let answer: Answer =
        serde_json::from_slice(&out.stdout).map_err(|error| format!("{program}: {error}"))?;
    if answer.username == TOKEN_USER {
        return Err(format!("{program}: identity tokens are not supported"));
    }
    Ok(Some(Login {
        user: answer.username,
        password: answer.secret,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn login(file: &str, domain: &str) -> Result<Option<Login>, String> {
        serde_json::from_str::<File>(file).unwrap().login(domain)
    }

    fn known(user: &str, password: &str) -> Result<Option<Login>, String> {
        Ok(Some(Login {
            user: user.to_owned(),
            password: password.to_owned(),
        }))
    }

    #[test]
    fn a_registry_is_found_by_its_host() {
        // me:se:cret
        let file = r#"{ "auths": {
            "https://index.docker.io/v1/": { "auth": "bWU6c2U6Y3JldA==" },
            "localhost:5000": { "username": "a", "password": "b" },
            "quay.io": {}
        }, "HttpHeaders": {} }"#;
        assert_eq!(login(file, "docker.io"), known("me", "se:cret"));
        assert_eq!(login(file, "localhost:5000"), known("a", "b"));
        assert_eq!(login(file, "quay.io"), Ok(None));
        assert_eq!(login(file, "localhost"), Ok(None));
    }

    #[test]
    fn what_cannot_be_used_is_said() {
        for (entry, reason) in [
            (r#"{ "auth": "!" }"#, "a: its auth is not"),
            (r#"{ "auth": "bWU=" }"#, "a: its auth is not"),
            (r#"{ "identitytoken": "x" }"#, "a: identity tokens"),
        ] {
            let file = format!(r#"{{ "auths": {{ "a": {entry} }} }}"#);
            let error = login(&file, "a").unwrap_err();
            assert!(error.starts_with(reason), "{error}");
        }
        let file = r#"{ "credsStore": "../evil" }"#;
        assert!(login(file, "a").is_err());
        let file = r#"{ "credHelpers": { "a": "no-such-helper" } }"#;
        let error = login(file, "a").unwrap_err();
        assert!(
            error.starts_with("docker-credential-no-such-helper: "),
            "{error}"
        );
        assert_eq!(login(file, "b"), Ok(None));
    }

    #[test]
    fn a_password_is_not_printed() {
        let shown = format!("{:?}", known("me", "secret"));
        assert!(shown.contains("me") && !shown.contains("secret"));
    }
}
