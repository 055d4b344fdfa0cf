//! The arrows between our crates point one way: vm-run -> fork -> vmm -> devices,
//! and what is the program's business stays in the program.

use anyhow::{Result, bail};
use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};

/// Which of our crates each may use.
const ARROWS: [(&str, &[&str]); 7] = [
    ("vm-run", &["vm-run-fork", "vm-run-archive"]),
    ("vm-run-fork", &["vm-run-vmm", "vm-run-abi"]),
    ("vm-run-vmm", &["vm-run-devices", "vm-run-abi"]),
    ("vm-run-devices", &[]),
    ("vm-run-abi", &[]),
    ("vm-run-archive", &[]),
    ("xtask", &[]),
];

/// What only the program may use: the libraries stay light.
const PROGRAM_ONLY: [&str; 7] = [
    "anyhow",
    "clap",
    "tokio",
    "hyper",
    "axum",
    "oci-spec",
    "env_logger",
];

/// Checks the checkout.
pub fn check() -> Result<()> {
    let metadata = MetadataCommand::new()
        .manifest_path(crate::host::root().join("Cargo.toml"))
        .exec()?;
    let wrong = wrong_arrows(&metadata);
    if !wrong.is_empty() {
        bail!("arrows that must not be:\n  {}", wrong.join("\n  "));
    }
    Ok(())
}

fn wrong_arrows(metadata: &Metadata) -> Vec<String> {
    let ours = |name: &str| ARROWS.iter().any(|(crate_, _)| *crate_ == name);
    let mut wrong = Vec::new();
    for package in &metadata.packages {
        let from = package.name.as_str();
        let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == from) else {
            if package.source.is_none() {
                wrong.push(format!("{from}: a crate of ours that no arrow names"));
            }
            continue;
        };
        for dependency in &package.dependencies {
            let to = dependency.name.as_str();
            // Tests of a crate may use its own features.
            if dependency.kind == DependencyKind::Development {
                continue;
            }
            let program = matches!(from, "vm-run" | "xtask");
            if (ours(to) && !allowed.contains(&to)) || (!program && PROGRAM_ONLY.contains(&to)) {
                wrong.push(format!("{from} -> {to}"));
            }
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arrows_point_one_way() {
        check().expect("one way");
    }

    #[test]
    fn an_arrow_upwards_is_found() {
        let mut metadata = MetadataCommand::new()
            .manifest_path(crate::host::root().join("Cargo.toml"))
            .no_deps()
            .exec()
            .expect("metadata");
        let devices = metadata
            .packages
            .iter_mut()
            .find(|package| package.name.as_str() == "vm-run-devices")
            .expect("devices");
        let mut up = devices.dependencies[0].clone();
        up.name = "vm-run-fork".into();
        up.kind = DependencyKind::Normal;
        devices.dependencies.push(up);
        assert_eq!(wrong_arrows(&metadata), ["vm-run-devices -> vm-run-fork"]);
    }
}
