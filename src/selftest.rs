//! `vm-run selftest`: one report on this host, fit for an issue.

use crate::bench::{self, ForkBench, GuestKind};
use crate::doctor::{self, Level};
use crate::templates::MachineArgs;
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
        for (guest, n, cpus) in plans(failures.is_empty()) {
            // Each fork checks its child: memory, registers and identity by what
            // a micro guest computes; a Linux guest confirms its identity.
            let bench = ForkBench {
                guest,
                n,
                machine: MachineArgs {
                    memory: 256 << 20,
                    cpus,
                    boot_timeout: 60,
                },
                json,
            };
            match bench::measure(&bench, Arc::clone(host)) {
                Ok(run) => runs.push(run),
                Err(error) => failures.push(format!(
                    "{guest:?} guest, {cpus} vCPU: {}",
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
                "ok    {} guest, {} vCPU: {} forks, p50 {} µs, floor {} µs, ratio {}",
                run["guest"].as_str().unwrap_or_default(),
                run["vcpus"],
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
fn plans(linux: bool) -> Vec<(GuestKind, u32, u8)> {
    let mut plans = vec![(GuestKind::Micro, 50, 1), (GuestKind::Micro, 20, 4)];
    if linux {
        plans.extend([(GuestKind::Linux, 10, 1), (GuestKind::Linux, 5, 2)]);
    }
    plans
}
