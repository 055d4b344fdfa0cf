//! The identity page: all that must differ in a child, written by the monitor
//! into the child's private memory before its first instruction.
//!
//! The page lies below 1 MiB in a range that the e820 map calls reserved, so
//! the guest kernel never uses it and `/dev/mem` may map it even with
//! `STRICT_DEVMEM` (Linux arch/x86/mm/init.c, `devmem_is_allowed`). In a parent
//! it is all zeroes.

/// The guest-physical address of the identity page.
pub const GPA: u64 = 0x9_e000;

/// The interrupt by which a child that was forked at any instruction is told to read
/// the page, before anything runs in it: made pending on all of its vCPUs
/// (`guest-kernel/linux/patches/0004-…`). One of the vectors that Linux gives to no
/// device (arch/x86/include/asm/irq_vectors.h).
pub const VECTOR: u8 = 0xf5;

/// Where in the page, in bytes, a kernel that takes that interrupt has put
/// [`DRIVER`], at its boot: any other would go on as its parent.
pub const DRIVER_AT: u64 = 0xff8;

/// See [`DRIVER_AT`].
pub const DRIVER: [u8; 8] = *b"vmrunirq";

/// How many bytes of the page are used, from its start.
pub const SIZE: usize = 168;

/// Fresh random bytes for the guest's CRNG.
pub const ENTROPY_LEN: usize = 64;

/// The longest hostname, as Linux has it (`__NEW_UTS_LEN`).
pub const HOSTNAME_MAX: usize = 64;

const MAGIC: [u8; 8] = *b"vmrun-id";

/// What a child is. All integers in the page are little-endian.
///
/// | offset | size | field |
/// |---|---|---|
/// | 0 | 8 | magic, `vmrun-id` |
/// | 8 | 8 | generation |
/// | 16 | 8 | realtime_ns |
/// | 24 | 64 | entropy |
/// | 88 | 1 | hostname's length |
/// | 89 | 64 | hostname |
/// | 153 | 1 | connections: 0 to reset them, 1 to keep them |
/// | 154 | 1 | 1 if it was forked while it ran |
/// | 155 | 13 | zero |
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    /// Never zero in a child, and never twice the same for one template.
    pub generation: u64,
    /// The host's CLOCK_REALTIME, in nanoseconds since the epoch.
    pub realtime_ns: u64,
    /// From the host's getrandom(2).
    pub entropy: [u8; ENTROPY_LEN],
    /// What becomes of a frozen container's connections.
    pub connections: Connections,
    /// Whether its parent ran when it was forked, at whatever instruction: its programs
    /// wait until its first process lets them go
    /// (`guest-kernel/linux/patches/0006-…`).
    pub live: bool,
    hostname: [u8; HOSTNAME_MAX],
    hostname_len: u8,
}

/// What becomes of the connections that a container had to the outside when it was frozen,
/// before it runs in a child.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Connections {
    /// Connections of TCP are aborted: their programs are told at once.
    #[default]
    Reset,
    /// They stay open: for who gives the child a network in which their other ends are.
    Keep,
}

/// Why a page or a hostname is no identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Invalid {
    /// The page does not begin with the magic: this is a parent.
    NoMagic,
    /// Generation zero belongs to the parent.
    NoGeneration,
    /// Empty, longer than [`HOSTNAME_MAX`] or not of the bytes `[A-Za-z0-9.-]`.
    Hostname,
    /// Nothing that there is to do with connections.
    Connections,
    /// Neither forked while it ran nor at its fork point.
    Live,
}

impl core::fmt::Display for Invalid {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::NoMagic => "the identity page is empty",
            Self::NoGeneration => "the identity page has no generation",
            Self::Hostname => "a hostname is 1 to 64 of the characters A-Z a-z 0-9 . -",
            Self::Connections => "the identity page says nothing of connections",
            Self::Live => "the identity page says nothing of the parent",
        })
    }
}

impl core::error::Error for Invalid {}

impl Identity {
    /// Checks `hostname` and puts the identity together. Connections are reset, and
    /// the parent was at its fork point.
    pub fn new(
        generation: u64,
        realtime_ns: u64,
        entropy: [u8; ENTROPY_LEN],
        hostname: &str,
    ) -> Result<Self, Invalid> {
        if generation == 0 {
            return Err(Invalid::NoGeneration);
        }
        let name = hostname.as_bytes();
        let legal = |b: &u8| b.is_ascii_alphanumeric() || *b == b'.' || *b == b'-';
        if name.is_empty() || name.len() > HOSTNAME_MAX || !name.iter().all(legal) {
            return Err(Invalid::Hostname);
        }
        let mut padded = [0; HOSTNAME_MAX];
        padded[..name.len()].copy_from_slice(name);
        Ok(Self {
            generation,
            realtime_ns,
            entropy,
            connections: Connections::default(),
            live: false,
            hostname: padded,
            hostname_len: name.len() as u8,
        })
    }

    /// The hostname; never empty.
    pub fn hostname(&self) -> &str {
        let name = &self.hostname[..usize::from(self.hostname_len)];
        core::str::from_utf8(name).unwrap_or_default()
    }

    /// The page's first [`SIZE`] bytes.
    pub fn to_bytes(&self) -> [u8; SIZE] {
        let mut page = [0; SIZE];
        page[0..8].copy_from_slice(&MAGIC);
        page[8..16].copy_from_slice(&self.generation.to_le_bytes());
        page[16..24].copy_from_slice(&self.realtime_ns.to_le_bytes());
        page[24..88].copy_from_slice(&self.entropy);
        page[88] = self.hostname_len;
        page[89..153].copy_from_slice(&self.hostname);
        page[153] = match self.connections {
            Connections::Reset => 0,
            Connections::Keep => 1,
        };
        page[154] = u8::from(self.live);
        page
    }

    /// Reads what [`Self::to_bytes`] wrote, and checks it.
    pub fn from_bytes(page: &[u8; SIZE]) -> Result<Self, Invalid> {
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&page[at..at + 8]);
            bytes
        };
        if word(0) != MAGIC {
            return Err(Invalid::NoMagic);
        }
        let mut entropy = [0; ENTROPY_LEN];
        entropy.copy_from_slice(&page[24..88]);
        let name = page[89..153]
            .get(..usize::from(page[88]))
            .and_then(|name| core::str::from_utf8(name).ok())
            .ok_or(Invalid::Hostname)?;
        let generation = u64::from_le_bytes(word(8));
        let mut identity = Self::new(generation, u64::from_le_bytes(word(16)), entropy, name)?;
        identity.connections = match page[153] {
            0 => Connections::Reset,
            1 => Connections::Keep,
            _ => return Err(Invalid::Connections),
        };
        identity.live = match page[154] {
            0 => false,
            1 => true,
            _ => return Err(Invalid::Live),
        };
        Ok(identity)
    }
}

impl core::fmt::Debug for Identity {
    /// Leaves out the entropy: a log is no place for it.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Identity")
            .field("generation", &self.generation)
            .field("realtime_ns", &self.realtime_ns)
            .field("hostname", &self.hostname())
            .field("connections", &self.connections)
            .field("live", &self.live)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_reads_back_as_it_was_written() {
        let id = Identity::new(7, 1_700_000_000_000_000_000, [9; 64], "web-1.local").unwrap();
        assert_eq!(Identity::from_bytes(&id.to_bytes()), Ok(id.clone()));
        assert_eq!(id.hostname(), "web-1.local");
        let mut keeping = id;
        keeping.connections = Connections::Keep;
        keeping.live = true;
        assert_eq!(Identity::from_bytes(&keeping.to_bytes()), Ok(keeping));
    }

    #[test]
    fn a_parent_or_a_spoilt_page_is_no_identity() {
        assert_eq!(Identity::from_bytes(&[0; SIZE]), Err(Invalid::NoMagic));
        let good = Identity::new(7, 0, [9; 64], "h").unwrap().to_bytes();
        let mut page = good;
        page[8..16].fill(0);
        assert_eq!(Identity::from_bytes(&page), Err(Invalid::NoGeneration));
        for len in [0, 65, 255] {
            let mut page = good;
            page[88] = len;
            assert_eq!(Identity::from_bytes(&page), Err(Invalid::Hostname));
        }
        let mut page = good;
        page[153] = 2;
        assert_eq!(Identity::from_bytes(&page), Err(Invalid::Connections));
        let mut page = good;
        page[154] = 2;
        assert_eq!(Identity::from_bytes(&page), Err(Invalid::Live));
    }

    #[test]
    fn hostnames_are_checked() {
        for name in ["", "a b", "a/b", "ä", &"x".repeat(65)] {
            assert_eq!(Identity::new(1, 0, [0; 64], name), Err(Invalid::Hostname));
        }
        assert!(Identity::new(1, 0, [0; 64], &"x".repeat(64)).is_ok());
    }
}
