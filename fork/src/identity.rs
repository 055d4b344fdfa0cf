//! The identity of a child, drawn before its first instruction.

use crate::error::Error;
use rustix::rand::{GetRandomFlags, getrandom};
use std::time::{SystemTime, UNIX_EPOCH};
use vm_run_abi::identity::{ENTROPY_LEN, Identity};

/// A new identity. The generation is random, so that children of one template
/// on disk differ whichever process forks them.
pub(crate) fn draw(hostname: &str) -> Result<Identity, Error> {
    let mut random = [0; ENTROPY_LEN + 8];
    let got =
        getrandom(&mut random[..], GetRandomFlags::empty()).map_err(|e| Error::Random(e.into()))?;
    if got != random.len() {
        // getrandom(2) gives up to 256 bytes whole once it is initialised.
        return Err(Error::Random(std::io::ErrorKind::UnexpectedEof.into()));
    }
    let (entropy, generation) = random.split_at(ENTROPY_LEN);
    let mut fixed = [0; ENTROPY_LEN];
    fixed.copy_from_slice(entropy);
    let mut word = [0; 8];
    word.copy_from_slice(generation);
    let generation = u64::from_le_bytes(word).max(1);
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Identity::new(generation, now.as_nanos() as u64, fixed, hostname).map_err(Error::Hostname)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_identities_are_alike() {
        let (a, b) = (draw("h").expect("drawn"), draw("h").expect("drawn"));
        assert_ne!(a.generation, b.generation);
        assert_ne!(a.entropy, b.entropy);
        assert!(matches!(draw("no spaces"), Err(Error::Hostname(_))));
    }
}
