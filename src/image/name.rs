//! Image names, by docker's rules: `busybox` is short for
//! `docker.io/library/busybox:latest` (distribution/reference, "familiar" names).

use super::error::{ImageError, Result};
use std::fmt;

const DEFAULT_DOMAIN: &str = "docker.io";
const OFFICIAL: &str = "library/";
const DEFAULT_TAG: &str = "latest";
/// The longest repository name, domain included.
const LONGEST_REPOSITORY: usize = 255;
const LONGEST_TAG: usize = 128;

/// A full name: domain, path and tag.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    domain: String,
    path: String,
    tag: String,
}

impl Name {
    /// Reads a name as a user types it.
    ///
    /// # Errors
    /// [`ImageError::BadName`] with the rule that it breaks.
    pub fn parse(text: &str) -> Result<Name> {
        let bad = |reason| ImageError::BadName {
            name: text.to_owned(),
            reason,
        };
        if text.contains('@') {
            return Err(bad(
                "a digest names content, and cannot be given to an image",
            ));
        }
        let (repository, tag) = match text.rsplit_once(':') {
            // A colon before a slash is a registry's port.
            Some((repository, tag)) if !tag.contains('/') => (repository, tag),
            _ => (text, DEFAULT_TAG),
        };
        let (domain, path) = match repository.split_once('/') {
            Some((first, rest)) if is_domain(first) => (first, rest),
            _ => (DEFAULT_DOMAIN, repository),
        };
        let domain = if domain == "index.docker.io" {
            DEFAULT_DOMAIN
        } else {
            domain
        };
        let path = if domain == DEFAULT_DOMAIN && !path.contains('/') {
            format!("{OFFICIAL}{path}")
        } else {
            path.to_owned()
        };
        if domain.len() + 1 + path.len() > LONGEST_REPOSITORY {
            return Err(bad("it is longer than 255 characters"));
        }
        if !is_host(domain) {
            return Err(bad("the registry is not a host name"));
        }
        if !path.split('/').all(is_component) {
            return Err(bad(
                "a repository is lower-case letters and digits, joined by '.', '_', '-' or '/'",
            ));
        }
        if !is_tag(tag) {
            return Err(bad("a tag is up to 128 letters, digits, '_', '.' or '-'"));
        }
        Ok(Name {
            domain: domain.to_owned(),
            path,
            tag: tag.to_owned(),
        })
    }

    /// The registry's host, and perhaps its port.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The repository's path in its registry.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The tag.
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// The repository as docker shows it: without the parts that are default.
    pub fn repository(&self) -> String {
        if self.domain != DEFAULT_DOMAIN {
            return format!("{}/{}", self.domain, self.path);
        }
        self.path
            .strip_prefix(OFFICIAL)
            .unwrap_or(&self.path)
            .to_owned()
    }

    /// Repository and tag as docker shows them: `busybox:latest`.
    pub fn familiar(&self) -> String {
        format!("{}:{}", self.repository(), self.tag)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}:{}", self.domain, self.path, self.tag)
    }
}

fn is_domain(first: &str) -> bool {
    first == "localhost"
        || first.contains(['.', ':'])
        || first.bytes().any(|b| b.is_ascii_uppercase())
}

/// A host name or an IPv6 address in brackets, and perhaps a port.
fn is_host(domain: &str) -> bool {
    let (host, port) = match domain.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (domain, None),
    };
    let is_label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    let is_address = |inside: &str| inside.bytes().all(|b| b.is_ascii_hexdigit() || b == b':');
    let bracketed = host
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    bracketed.map_or_else(|| host.split('.').all(is_label), is_address)
        && port.is_none_or(|port| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()))
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_component(component: &str) -> bool {
    let is_alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    let ends_well = |b: Option<&u8>| b.is_some_and(|b| is_alphanumeric(*b));
    ends_well(bytes.first())
        && ends_well(bytes.last())
        && bytes
            .iter()
            .all(|b| is_alphanumeric(*b) || b"._-".contains(b))
        && bytes.split(|b| is_alphanumeric(*b)).all(|separator| {
            matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|b| *b == b'-')
        })
}

fn is_tag(tag: &str) -> bool {
    (1..=LONGEST_TAG).contains(&tag.len())
        && !tag.starts_with(['.', '-'])
        && tag
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_completed_and_shown_short() {
        for (typed, full, shown) in [
            (
                "busybox",
                "docker.io/library/busybox:latest",
                "busybox:latest",
            ),
            (
                "busybox:1.36",
                "docker.io/library/busybox:1.36",
                "busybox:1.36",
            ),
            (
                "docker.io/busybox",
                "docker.io/library/busybox:latest",
                "busybox:latest",
            ),
            (
                "index.docker.io/library/busybox",
                "docker.io/library/busybox:latest",
                "busybox:latest",
            ),
            ("me/tool:v1", "docker.io/me/tool:v1", "me/tool:v1"),
            ("quay.io/x/y", "quay.io/x/y:latest", "quay.io/x/y:latest"),
            (
                "localhost:5000/a",
                "localhost:5000/a:latest",
                "localhost:5000/a:latest",
            ),
            ("localhost/a", "localhost/a:latest", "localhost/a:latest"),
            (
                "a__b-c--d.e",
                "docker.io/library/a__b-c--d.e:latest",
                "a__b-c--d.e:latest",
            ),
        ] {
            let name = Name::parse(typed).unwrap();
            assert_eq!(name.to_string(), full);
            assert_eq!(name.familiar(), shown);
            assert_eq!(Name::parse(full).unwrap(), name);
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let long = "a".repeat(256);
        for typed in [
            "",
            "Busybox",
            "a//b",
            "a:",
            "a:b c",
            "-a",
            "a..b",
            "a___b",
            "../x",
            "a@sha256:00",
            "a:-x",
            &long,
        ] {
            assert!(
                matches!(Name::parse(typed), Err(ImageError::BadName { .. })),
                "{typed}"
            );
        }
    }
}
