//! What containers are called: ids, and names for those who are given none.

use anyhow::{Context, Result, bail, ensure};
use std::fs::File;
use std::io::Read;

/// Hexadecimal digits of an id, as docker has it.
const ID_DIGITS: usize = 64;
/// Those that people are shown.
pub const SHORT_ID: usize = 12;

/// A fresh id.
///
/// # Errors
/// A kernel that has no random bytes.
pub fn new_id() -> Result<String> {
    let bytes: [u8; ID_DIGITS / 2] = random()?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// As much of an id as people are shown.
pub fn short(id: &str) -> &str {
    id.get(..SHORT_ID).unwrap_or(id)
}

/// A name for a container that was given none. It may be taken: then the next try
/// gives another.
///
/// # Errors
/// As [`new_id`].
pub fn new_name() -> Result<String> {
    let [a, b, c]: [u8; 3] = random()?;
    let adjective = ADJECTIVES[usize::from(a) % ADJECTIVES.len()];
    let noun = NOUNS[usize::from(b) % NOUNS.len()];
    Ok(format!("{adjective}_{noun}{}", c % 100))
}

/// Whether this looks like an id.
pub fn is_id(text: &str) -> bool {
    text.len() == ID_DIGITS && text.chars().all(|c| c.is_ascii_hexdigit())
}

/// Whether a name can be a container's: docker's rule.
///
/// # Errors
/// One line that says the rule.
pub fn check_name(name: &str) -> Result<()> {
    let legal = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    let starts = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    ensure!(
        name.len() >= 2 && name.len() <= 128 && starts && name.chars().all(legal),
        "{name:?} is no container name: two or more letters, digits, _ . -, and a letter or digit first"
    );
    // A name that looks like an id would hide a container.
    if is_id(name) {
        bail!("{name:?} looks like an id: choose another name");
    }
    Ok(())
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("cannot read /dev/urandom")?;
    Ok(bytes)
}

const ADJECTIVES: [&str; 32] = [
    "able", "brave", "bright", "brisk", "calm", "clear", "clever", "cool", "crisp", "eager",
    "early", "fair", "fast", "fine", "firm", "fond", "glad", "keen", "kind", "lively", "lucid",
    "merry", "neat", "noble", "proud", "quick", "quiet", "sharp", "sound", "swift", "warm", "wise",
];

const NOUNS: [&str; 32] = [
    "aspen", "badger", "beacon", "birch", "brook", "cedar", "comet", "coral", "crane", "dune",
    "ember", "falcon", "fern", "finch", "fjord", "glade", "harbor", "heron", "island", "lark",
    "maple", "meadow", "otter", "pine", "quartz", "raven", "reef", "river", "sparrow", "spruce",
    "summit", "willow",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_names_are_what_they_should_be() {
        let id = new_id().expect("random");
        assert_eq!((id.len(), short(&id).len()), (ID_DIGITS, SHORT_ID));
        assert_ne!(id, new_id().expect("random"));
        check_name(&new_name().expect("random")).expect("legal");
        for bad in ["", "a", "-ab", "a/b", "a b", &id] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
