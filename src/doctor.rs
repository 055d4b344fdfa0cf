//! `vm-run doctor`: what this host can do, each finding with its cure.

use crate::guest::{self, GuestArgs};
use crate::net;
use anyhow::Result;
use fork::{Host, Isolation};
use serde::Serialize;
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::path::Path;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// It works, but not as well as it could.
    Warn,
    /// vm-run cannot run containers here.
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// What.
    pub name: &'static str,
    /// How it is.
    pub level: Level,
    /// In words.
    pub finding: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cure: Option<String>,
}

/// Looks at everything, prints it; the status is 0 if containers can run.
///
/// # Errors
/// Output that cannot be written.
pub fn cli(json: bool) -> Result<u8> {
    let findings = examine();
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(
            out,
            "{}",
            serde_json::to_string_pretty(&json!({ "findings": findings }))?
        )?;
    } else {
        for f in &findings {
            let mark = match f.level {
                Level::Ok => "ok  ",
                Level::Warn => "warn",
                Level::Fail => "FAIL",
            };
            writeln!(out, "{mark}  {}: {}", f.name, f.finding)?;
            if let Some(cure) = &f.cure {
                writeln!(out, "      cure: {cure}")?;
            }
        }
    }
    let failed = findings.iter().any(|f| f.level == Level::Fail);
    Ok(u8::from(failed))
}

/// All findings.
pub fn examine() -> Vec<Finding> {
    let mut all = Vec::new();
    match Host::open() {
        Ok(host) => {
            all.push(ok("kvm", format!("/dev/kvm is there; CPU: {}", host.cpu())));
            all.push(linux_guests(&host));
        }
        Err(error) => {
            let text = error.to_string();
            // The message is "what: cure".
            let (what, cure) = text.split_once(": ").unwrap_or((&text, ""));
            all.push(Finding {
                name: "kvm",
                level: Level::Fail,
                finding: what.into(),
                cure: (!cure.is_empty()).then(|| cure.into()),
            });
        }
    }
    all.push(match guest::find(&GuestArgs::default()) {
        Ok(found) => ok("guest", found.guest.kernel.display().to_string()),
        Err(error) => Finding {
            name: "guest",
            level: Level::Fail,
            finding: crate::line(&error),
            cure: Some("install vm-run's guest, or build it: cargo xtask guest".into()),
        },
    });
    all.push(networks());
    all.extend(host_tuning());
    all
}

/// What a network needs is tried, in a namespace that goes with the trial.
fn networks() -> Finding {
    let warn = |finding: String, cure: &str| Finding {
        name: "networks",
        level: Level::Warn,
        finding,
        cure: Some(cure.into()),
    };
    if let Err(error) = net::trial() {
        let finding = format!("containers here have none: {}", crate::line(&error));
        return warn(
            finding,
            "be root, and load the modules bridge, veth, tun, nf_tables, nft_chain_nat, nft_fib_inet and nft_reject_inet",
        );
    }
    if Path::new("/sys/class/net/docker0").exists() {
        return warn(
            "Docker is on this host, and its rules drop what others forward".into(),
            "let ours through: iptables -I DOCKER-USER -i 'vmr-+' -j ACCEPT, and the same with -o; ignore this if that is done",
        );
    }
    ok("networks", "bridges, taps and nf_tables are there".into())
}

fn ok(name: &'static str, finding: String) -> Finding {
    Finding {
        name,
        level: Level::Ok,
        finding,
        cure: None,
    }
}

/// A kernel in the guest needs SYSCALL to enter ring 0: tried, not guessed.
fn linux_guests(host: &Host) -> Finding {
    let fail = |finding: String| {
        Finding {
        name: "linux guests",
        level: Level::Fail,
        finding,
        cure: Some("use a host with VMX or SVM (nested virtualization on a cloud machine); in a checkout, cargo xtask vmhost -- CMD emulates one".into()),
    }
    };
    match host.isolation() {
        Ok(Isolation::Hardware) => ok("linux guests", "SYSCALL enters ring 0: Linux can run".into()),
        Ok(Isolation::SyscallStaysInUserMode) => fail(
            "this KVM is PVM (no VMX or SVM): SYSCALL in a guest does not enter ring 0, so Linux cannot run; bench fork --guest micro can".into(),
        ),
        Err(error) => fail(format!("a guest of ten instructions failed: {error}")),
    }
}

fn host_tuning() -> Vec<Finding> {
    let mut all = Vec::new();
    let available = meminfo("MemAvailable").unwrap_or(0) >> 10;
    all.push(if available >= 1024 {
        ok("memory", format!("{available} MiB available"))
    } else {
        Finding {
            name: "memory",
            level: Level::Warn,
            finding: format!("only {available} MiB available"),
            cure: Some("give guests less with --memory, or free some".into()),
        }
    });
    let nx = read("/sys/module/kvm/parameters/nx_huge_pages");
    let multihit = read("/sys/devices/system/cpu/vulnerabilities/itlb_multihit");
    if nx.as_deref() == Some("Y") && multihit.as_deref() == Some("Not affected") {
        all.push(Finding {
            name: "kvm.nx_huge_pages",
            level: Level::Warn,
            finding:
                "on, and this CPU does not need it: each VM's first run starts a thread for it"
                    .into(),
            cure: Some("options kvm nx_huge_pages=never in /etc/modprobe.d".into()),
        });
    }
    if let Some(smt) = read("/sys/devices/system/cpu/smt/active") {
        all.push(if smt == "1" {
            Finding {
                name: "smt",
                level: Level::Warn,
                finding: "on: siblings on one core can watch each other through its caches".into(),
                cure: Some(
                    "nosmt on the host's command line, if guests do not trust each other".into(),
                ),
            }
        } else {
            ok("smt", "off".into())
        });
    }
    all
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|t| t.trim().to_owned())
}

/// A line of /proc/meminfo, in KiB.
fn meminfo(name: &str) -> Option<u64> {
    read("/proc/meminfo")?
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
}

/// What a figure has to be read beside: CPU, kernel, kind of KVM.
pub fn host_facts(host: &Host) -> Value {
    let cpu = read("/proc/cpuinfo").and_then(|text| {
        let line = text.lines().find(|l| l.starts_with("model name"))?;
        Some(line.split_once(": ")?.1.to_owned())
    });
    let has = |flag: &str| {
        read("/proc/cpuinfo").is_some_and(|text| {
            text.lines()
                .find(|l| l.starts_with("flags"))
                .is_some_and(|l| l.split_whitespace().any(|f| f == flag))
        })
    };
    let emulated = cpu.as_deref().is_some_and(|name| name.contains("QEMU TCG"));
    let kvm = match host.isolation() {
        Ok(Isolation::Hardware) if emulated => "SVM, emulated by QEMU's TCG",
        Ok(Isolation::Hardware) if has("vmx") => "VMX",
        Ok(Isolation::Hardware) if has("svm") => "SVM",
        Ok(Isolation::Hardware) => "unknown, runs ring 0",
        Ok(Isolation::SyscallStaysInUserMode) => "PVM",
        Err(_) => "unknown",
    };
    json!({
        "cpu": cpu.unwrap_or_else(|| host.cpu().to_string()),
        "kernel": read("/proc/sys/kernel/osrelease"),
        "kvm": kvm,
    })
}
