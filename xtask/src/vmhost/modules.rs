//! Which kernel modules to load, and in which order: depmod's `modules.dep` and
//! `modules.builtin`.

use anyhow::{Result, bail};
use std::collections::{HashMap, HashSet};

/// The files (relative to the module tree) that load `wanted`, each after all that
/// it depends on and each once. A module that is built into the kernel needs no file.
///
/// `dep` and `builtin` are the texts of depmod's files; names are compared as the
/// kernel does, with `-` and `_` the same.
pub fn load_order<'a>(wanted: &[&str], dep: &'a str, builtin: &str) -> Result<Vec<&'a str>> {
    let dependencies: HashMap<String, (&str, &str)> = dep
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(file, needs)| (module_name(file), (file, needs)))
        .collect();
    let builtin: HashSet<String> = builtin.lines().map(module_name).collect();

    let mut seen = HashSet::new();
    let mut order = Vec::new();
    for wanted in wanted {
        let name = module_name(wanted);
        if builtin.contains(&name) {
            continue;
        }
        let Some((file, needs)) = dependencies.get(&name) else {
            bail!("the kernel package has no module {wanted}");
        };
        // modules.dep lists all dependencies, the innermost last.
        for file in needs.split_whitespace().rev().chain([*file]) {
            if seen.insert(file) {
                order.push(file);
            }
        }
    }
    Ok(order)
}

/// `kernel/arch/x86/kvm/kvm-amd.ko.xz` is the module `kvm_amd`.
pub fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "\
kernel/kvm/kvm-amd.ko.xz: kernel/crypto/ccp.ko.xz kernel/kvm/kvm.ko.xz kernel/virt/irqbypass.ko.xz
kernel/kvm/kvm.ko.xz: kernel/virt/irqbypass.ko.xz
kernel/crypto/ccp.ko.xz:
kernel/virt/irqbypass.ko.xz:
kernel/fs/overlay.ko.xz:
";

    #[test]
    fn dependencies_come_first_and_once() {
        let order = load_order(&["kvm_amd", "overlay", "kvm"], DEP, "").unwrap();
        assert_eq!(
            order,
            [
                "kernel/virt/irqbypass.ko.xz",
                "kernel/kvm/kvm.ko.xz",
                "kernel/crypto/ccp.ko.xz",
                "kernel/kvm/kvm-amd.ko.xz",
                "kernel/fs/overlay.ko.xz",
            ]
        );
    }

    #[test]
    fn built_in_modules_need_no_file() {
        let order = load_order(
            &["virtio_pci", "overlay"],
            DEP,
            "kernel/virtio/virtio-pci.ko\n",
        )
        .unwrap();
        assert_eq!(order, ["kernel/fs/overlay.ko.xz"]);
    }

    #[test]
    fn an_absent_module_is_named() {
        let error = load_order(&["nosuch"], DEP, "").unwrap_err();
        assert!(error.to_string().contains("nosuch"));
    }
}
