//! How large a container may be, and which machine it gets: the smallest of a ladder,
//! so that a template serves more than one size.

use crate::args::size;
use crate::templates::{BOOT_TIMEOUT, CPUS, MEMORY, MachineArgs};
use anyhow::{Result, anyhow, bail};
use fork::Manifest;

/// What can be typed.
#[derive(Debug, clap::Args)]
pub struct SizeArgs {
    /// The most memory of its processes [default: what its machine of 256m has]
    #[arg(short, long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// The most processors of its processes, as 0.5 or 2 [default: 1]
    #[arg(long, value_name = "N", value_parser = nano_cpus)]
    cpus: Option<u64>,
    /// How long the guest may take to boot, in seconds
    #[arg(long, value_name = "SECONDS", default_value = BOOT_TIMEOUT)]
    boot_timeout: u64,
}

/// Docker's least memory.
const MEMORY_MIN: u64 = 6 << 20;
/// The largest machine's.
const MEMORY_MAX: u64 = 1 << 40;
/// What a guest takes for itself, beside a thirty-second part of its memory.
const GUEST: u64 = 64 << 20;
const NANO: u64 = 1_000_000_000;
/// The most processors of a machine.
const CPUS_MAX: u64 = 32;

impl SizeArgs {
    /// The most memory, if that was said.
    pub fn memory(&self) -> Option<u64> {
        self.memory
    }

    /// The most processors in billionths, if that was said; docker takes zero for no
    /// limit.
    pub fn nano_cpus(&self) -> Option<u64> {
        self.cpus.filter(|cpus| *cpus > 0)
    }

    /// An option that was given.
    pub fn given(&self) -> Option<&'static str> {
        let all = [
            (self.memory.is_some(), "-m"),
            (self.cpus.is_some(), "--cpus"),
        ];
        all.iter().find(|(given, _)| *given).map(|(_, name)| *name)
    }

    /// The smallest machine of the ladder that has as much, and the guest's own beside.
    ///
    /// # Errors
    /// More or less than there can be, in docker's words.
    pub fn machine(&self) -> Result<MachineArgs> {
        self.check()?;
        let least = size(MEMORY).map_err(anyhow::Error::msg)?;
        let memory = match self.memory {
            None => least,
            Some(wanted) => std::iter::successors(Some(least), |rung| rung.checked_mul(2))
                .take_while(|rung| *rung <= MEMORY_MAX)
                .find(|rung| wanted.saturating_add(GUEST + wanted / 32) <= *rung)
                .ok_or_else(|| anyhow!("-m {wanted} is more than a virtual machine can have"))?,
        };
        let cpus = match self.nano_cpus() {
            None => CPUS.parse()?,
            Some(nano) => u8::try_from(nano.div_ceil(NANO).next_power_of_two())?,
        };
        Ok(MachineArgs {
            memory,
            cpus,
            boot_timeout: self.boot_timeout,
        })
    }

    /// The machine of a template that was named.
    ///
    /// # Errors
    /// One that has less than was asked for.
    pub fn machine_of(&self, name: &str, template: &Manifest) -> Result<MachineArgs> {
        self.check()?;
        let memory = template.memory_bytes;
        let cpus = u8::try_from(template.vcpus)?;
        if let Some(wanted) = self.memory.filter(|wanted| *wanted > memory) {
            bail!("-m {wanted} does not fit into the template {name}, which has {memory} bytes");
        }
        if self
            .nano_cpus()
            .is_some_and(|nano| nano > u64::from(cpus) * NANO)
        {
            bail!("--cpus is more than the {cpus} of the template {name}");
        }
        Ok(MachineArgs {
            memory,
            cpus,
            boot_timeout: self.boot_timeout,
        })
    }

    fn check(&self) -> Result<()> {
        if self.memory.is_some_and(|memory| memory < MEMORY_MIN) {
            bail!("minimum memory limit allowed is 6MB");
        }
        let least = NANO / 100;
        if self
            .nano_cpus()
            .is_some_and(|n| n < least || n > CPUS_MAX * NANO)
        {
            bail!("range of CPUs is from 0.01 to {CPUS_MAX}.00, the most of a virtual machine");
        }
        Ok(())
    }
}

/// Reads a number of processors, in billionths.
fn nano_cpus(text: &str) -> Result<u64, String> {
    let number = text.parse::<f64>().ok();
    let number = number.filter(|n| n.is_finite() && (0.0..1e6).contains(n));
    let nano = |number: f64| (number * 1e9).round() as u64;
    number
        .map(nano)
        .ok_or_else(|| "a number of processors is like 2 or 0.5".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        size: SizeArgs,
    }

    fn machine(words: &[&str]) -> Result<(u64, u8)> {
        let size = Line::try_parse_from([&["run"], words].concat())?.size;
        let machine = size.machine()?;
        Ok((machine.memory >> 20, machine.cpus))
    }

    #[test]
    fn the_smallest_machine_that_suffices_is_taken() {
        for (words, expected) in [
            (&[][..], (256, 1)),
            (&["-m", "6m"], (256, 1)),
            (&["-m", "128m"], (256, 1)),
            (&["-m", "186m"], (256, 1)),
            // The guest has to have some, too.
            (&["-m", "256m"], (512, 1)),
            (&["-m", "300m"], (512, 1)),
            (&["-m", "1g"], (2048, 1)),
            (&["--cpus", "0"], (256, 1)),
            (&["--cpus", "0.5"], (256, 1)),
            (&["--cpus", "1.5"], (256, 2)),
            (&["--cpus", "3"], (256, 4)),
            (&["--cpus", "32"], (256, 32)),
        ] {
            assert_eq!(machine(words).expect("fits"), expected, "{words:?}");
        }
        for words in [
            ["-m", "5m"],
            ["-m", "1024g"],
            ["--cpus", "0.001"],
            ["--cpus", "33"],
            ["--cpus", "many"],
            ["--cpus", "-1"],
            ["--cpus", "NaN"],
        ] {
            assert!(machine(&words).is_err(), "{words:?}");
        }
    }
}
