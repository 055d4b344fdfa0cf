//! `vm-run selftest`: one report on this host, fit for an issue.

use crate::bench::{self, ForkBench, GuestKind, Mode};
use crate::doctor::{self, Level};
use crate::templates::MachineArgs;
use crate::workers::JailArgs;
use anyhow::Result;
use fork::Host;
use serde_json::{Value, json};
use std::io::Write;
use std::sync::Arc;

/// Runs everything; the status is 0 if nothing failed.
///
/// # Errors
/// Output that cannot be written.
pub fn cli(json: bool) -> Result<u8> {
    let findings = doctor::examine();
    let host = Host::open().map(Arc::new);
    let mut failures: Vec<String> = findings
        .iter()
        .filter(|f| f.level == Level::Fail)
        .map(|f| format!("{}: {}", f.name, f.finding))
        .collect();
    let mut runs = Vec::new();
    let mut facts = Value::Null;
    if let Ok(host) = &host {
        facts = doctor::host_facts(host);
        // Whoever is not root has no jail, and is told so.
        let jail = JailArgs {
            no_jail: !rustix::process::geteuid().is_root(),
        };
        for (guest, mode, n, cpus) in plans(failures.is_empty()) {
            // Each fork checks its child: memory, registers and identity by what
            // a micro guest computes; a Linux guest confirms its identity.
            let bench = ForkBench {
                guest,
                modes: Vec::new(),
                n,
                alive: None,
                at_once: None,
                jail,
                machine: MachineArgs {
                    memory: 256 << 20,
                    cpus,
                    boot_timeout: 60,
                },
                json,
            };
            match bench::measure(&bench, mode, Arc::clone(host)) {
                Ok(run) => runs.push(run),
                Err(error) => failures.push(format!(
                    "{guest:?} guest, {cpus} vCPU, {}: {}",
                    mode.name(),
                    crate::line(&error)
                )),
            }
        }
    }
    let report = json!({
        "vm_run": env!("CARGO_PKG_VERSION"),
        "host": facts,
        "findings": findings,
        "runs": runs,
        "failures": failures,
    });
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        for run in &runs {
            writeln!(
                out,
                "ok    {} guest, {} vCPU, {}: {} forks, p50 {} µs, floor {} µs, ratio {}",
                run["guest"].as_str().unwrap_or_default(),
                run["vcpus"],
                run["mode"].as_str().unwrap_or_default(),
                run["n"],
                run["fork_us"]["p50"],
                run["floor_us"]["p50"],
                run["ratio_p50"],
            )?;
        }
        for failure in &failures {
            writeln!(out, "FAIL  {failure}")?;
        }
        writeln!(
            out,
            "\nthe whole report, for an issue: vm-run selftest --json"
        )?;
    }
    Ok(u8::from(!failures.is_empty()))
}

/// What is run: Linux only where nothing has failed yet.
fn plans(linux: bool) -> Vec<(GuestKind, Mode, u32, u8)> {
    use GuestKind::{Linux, Micro};
    let mut plans = vec![
        (Micro, Mode::Cold, 50, 1),
        (Micro, Mode::Cold, 20, 4),
        (Micro, Mode::PoolInprocess, 20, 1),
        (Micro, Mode::PoolWorker, 20, 1),
    ];
    if linux {
        plans.extend([(Linux, Mode::Cold, 10, 1), (Linux, Mode::PoolWorker, 5, 2)]);
    }
    plans
}
