//! What users call an image: a name, or a digest in a repository, or both.

use super::digest::hex;
use super::error::{ImageError, Result};
use super::name::Name;

/// `NAME[:TAG][@sha256:HEX]`. With a digest the tag says nothing, as in docker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// The name, whose tag is `latest` where none was given.
    pub name: Name,
    /// The digest of a manifest or an index.
    pub digest: Option<String>,
}

impl Reference {
    /// Reads a reference as a user types it.
    ///
    /// # Errors
    /// [`ImageError::BadName`] with the rule that it breaks.
    pub fn parse(text: &str) -> Result<Reference> {
        let Some((name, digest)) = text.split_once('@') else {
            let name = Name::parse(text)?;
            return Ok(Reference { name, digest: None });
        };
        hex(digest).map_err(|_| ImageError::BadName {
            name: text.to_owned(),
            reason: "after the @ stand sha256: and 64 hexadecimal digits",
        })?;
        Ok(Reference {
            name: Name::parse(name)?,
            digest: Some(digest.to_owned()),
        })
    }

    /// As docker shows it: short, and without a tag that says nothing.
    pub fn familiar(&self) -> String {
        match &self.digest {
            Some(digest) => format!("{}@{digest}", self.name.repository()),
            None => self.name.familiar(),
        }
    }
}

/// How an image is called by its content: `DOMAIN/PATH@sha256:HEX`.
pub fn by_digest(name: &Name, digest: &str) -> String {
    format!("{}/{}@{digest}", name.domain(), name.path())
}

/// A full name, by tag or by digest, as docker shows it.
pub fn familiar(full: &str) -> String {
    Reference::parse(full).map_or_else(|_| full.to_owned(), |reference| reference.familiar())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_goes_before_the_tag() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        let both = Reference::parse(&format!("busybox:1.36@{digest}")).unwrap();
        assert_eq!(both.name.tag(), "1.36");
        assert_eq!(both.familiar(), format!("busybox@{digest}"));
        let full = by_digest(&both.name, &digest);
        assert_eq!(full, format!("docker.io/library/busybox@{digest}"));
        assert_eq!(familiar(&full), both.familiar());
        assert_eq!(familiar("docker.io/library/busybox:1"), "busybox:1");
    }

    #[test]
    fn other_digests_are_refused() {
        for typed in ["a@", "a@sha256:00", "a@sha512:00", "@sha256:00", "a@b@c"] {
            assert!(
                matches!(Reference::parse(typed), Err(ImageError::BadName { .. })),
                "{typed}"
            );
        }
    }
}
