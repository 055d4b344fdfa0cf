//! The keys that leave a container alone, looked for in what is typed.

/// Docker's: control-P, control-Q.
const DEFAULT: [u8; 2] = [0x10, 0x11];

/// Looks for the keys to leave, which may come one by one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    keys: Vec<u8>,
    /// How many of them have come and are held back.
    held: usize,
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            keys: DEFAULT.to_vec(),
            held: 0,
        }
    }
}

impl Keys {
    /// Reads docker's notation: letters and `ctrl-LETTER`, with commas between.
    ///
    /// # Errors
    /// Anything else.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!("invalid detach keys ({text}): keys are like a or ctrl-p, with commas between")
        };
        let key = |name: &str| match name.strip_prefix("ctrl-").map(str::as_bytes) {
            // The control characters have the letters' low five bits.
            Some([key @ (b'a'..=b'z' | b'@' | b'['..=b'_')]) => Ok(key & 0x1f),
            Some(_) => Err(wrong()),
            None => match name.as_bytes() {
                [key] if key.is_ascii_graphic() => Ok(*key),
                _ => Err(wrong()),
            },
        };
        let keys = text.split(',').map(key).collect::<Result<_, _>>()?;
        Ok(Self { keys, held: 0 })
    }

    /// What is the container's, and whether to leave.
    pub fn filter(&mut self, bytes: &[u8]) -> (Vec<u8>, bool) {
        let mut passed = Vec::with_capacity(bytes.len());
        for byte in bytes {
            if *byte != self.keys[self.held] {
                passed.extend_from_slice(&self.keys[..self.held]);
                self.held = 0;
            }
            if *byte == self.keys[self.held] {
                self.held += 1;
                if self.held == self.keys.len() {
                    return (passed, true);
                }
            } else {
                passed.push(*byte);
            }
        }
        (passed, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(mut keys: Keys, pieces: &[&[u8]]) -> (Vec<u8>, bool) {
        let mut all = Vec::new();
        for piece in pieces {
            let (passed, leave) = keys.filter(piece);
            all.extend(passed);
            if leave {
                return (all, true);
            }
        }
        (all, false)
    }

    #[test]
    fn the_keys_to_leave_are_found_and_nothing_else_is_lost() {
        let typed = |pieces: &[&[u8]]| typed(Keys::default(), pieces);
        assert_eq!(typed(&[b"ls\n"]), (b"ls\n".to_vec(), false));
        assert_eq!(typed(&[b"a\x10\x11b"]), (b"a".to_vec(), true));
        assert_eq!(typed(&[b"a\x10", b"\x11"]), (b"a".to_vec(), true));
        assert_eq!(typed(&[b"\x10", b"x\x11"]), (b"\x10x\x11".to_vec(), false));
        assert_eq!(typed(&[b"\x10\x10\x11"]), (b"\x10".to_vec(), true));
    }

    #[test]
    fn keys_are_named_as_docker_names_them() {
        assert_eq!(Keys::parse("ctrl-p,ctrl-q"), Ok(Keys::default()));
        let keys = || Keys::parse("ctrl-@,x").expect("keys");
        assert_eq!(typed(keys(), &[b"ax\0x"]), (b"ax".to_vec(), true));
        let keys = || Keys::parse("ctrl-_").expect("keys");
        assert_eq!(typed(keys(), &[b"a\x1fb"]), (b"a".to_vec(), true));
        for bad in ["", "ctrl-", "ctrl-p,", "ctrl-A", "ctrl-pq", "ab", "é"] {
            assert!(Keys::parse(bad).is_err(), "{bad}");
        }
    }
}
