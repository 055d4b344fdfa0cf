//! Docker's objects of what is here.

use crate::container::wire::Stats;
use crate::container::{self, Engine, Record, Status};
use crate::net;
use anyhow::Result;
use docker_api::models::{ContainerSummary, SystemInfo, SystemVersion};
use docker_api::{API_VERSION, API_VERSION_MIN};
use serde_json::{Value, json};
use std::ffi::CStr;
use std::path::Path;

fn text(text: &CStr) -> Option<String> {
    Some(text.to_string_lossy().into_owned())
}

/// Of ourselves.
pub fn version() -> SystemVersion {
    SystemVersion {
        version: Some(env!("CARGO_PKG_VERSION").into()),
        api_version: Some(API_VERSION.into()),
        min_api_version: Some(API_VERSION_MIN.into()),
        os: Some("linux".into()),
        arch: Some("amd64".into()),
        kernel_version: text(rustix::system::uname().release()),
        ..SystemVersion::default()
    }
}

/// Of a state directory with these containers and so many images, and of the host.
pub fn info(root: &Path, records: &[Record], images: usize) -> SystemInfo {
    let count = |fits: fn(Status) -> bool| {
        let fitting = records.iter().filter(|record| fits(record.state.status));
        Some(fitting.count() as i64)
    };
    let host = rustix::system::uname();
    let found = rustix::system::sysinfo();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    SystemInfo {
        id: text(host.nodename()),
        containers: count(|_| true),
        containers_running: count(|status| status == Status::Running),
        containers_paused: count(|status| status == Status::Paused),
        containers_stopped: count(|status| !status.is_live()),
        images: Some(images as i64),
        driver: Some("erofs".into()),
        docker_root_dir: Some(root.display().to_string()),
        logging_driver: Some("json-file".into()),
        kernel_version: text(host.release()),
        operating_system: Some("vm-run".into()),
        os_type: Some("linux".into()),
        architecture: text(host.machine()),
        name: text(host.nodename()),
        ncpu: Some(cpus as i64),
        mem_total: Some((found.totalram * u64::from(found.mem_unit)) as i64),
        server_version: Some(env!("CARGO_PKG_VERSION").into()),
        default_runtime: Some("vm-run".into()),
        ..SystemInfo::default()
    }
}

/// Of a container, as docker's list has it. Looks at no file.
///
/// # Errors
/// A name of something that docker has no word for.
pub fn summary(engine: &Engine, record: &Record) -> Result<ContainerSummary> {
    let mut object = json!({});
    net::describe(record, &mut object);
    let ports = object["NetworkSettings"]["Ports"].as_object();
    let ports: Vec<Value> = ports.into_iter().flatten().flat_map(port_objects).collect();
    let summary = json!({
        "Id": record.id,
        "Names": [format!("/{}", record.name)],
        "Image": record.spec.image,
        "ImageID": record.spec.image_id.clone().unwrap_or_default(),
        "Command": record.spec.args.join(" "),
        "Created": record.spec.created.as_second(),
        "Ports": ports,
        "Labels": record.spec.labels,
        "State": record.state.status.word(),
        "Status": container::status(&record.state),
        "HostConfig": { "NetworkMode": object["HostConfig"]["NetworkMode"] },
        "NetworkSettings": { "Networks": object["NetworkSettings"]["Networks"] },
        "Mounts": engine.mounts(record),
    });
    Ok(serde_json::from_value(summary)?)
}

/// The entries of a port of `inspect` in a list.
fn port_objects((port, bindings): (&String, &Value)) -> Vec<Value> {
    let (number, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
    let number: u16 = number.parse().unwrap_or_default();
    let own = json!({ "PrivatePort": number, "Type": protocol });
    let published = bindings.as_array().into_iter().flatten().map(|binding| {
        let host: Option<u16> = binding["HostPort"]
            .as_str()
            .and_then(|port| port.parse().ok());
        json!({
            "IP": binding["HostIp"],
            "PrivatePort": number,
            "PublicPort": host,
            "Type": protocol,
        })
    });
    let published: Vec<Value> = published.collect();
    match published.is_empty() {
        true => vec![own],
        false => published,
    }
}

/// What a container costs, as far as it is known here.
pub fn stats(record: &Record, stats: &Stats) -> Value {
    let cpus = record.spec.cpus;
    json!({
        "id": record.id,
        "name": format!("/{}", record.name),
        "read": jiff::Timestamp::now(),
        "preread": "0001-01-01T00:00:00Z",
        "cpu_stats": {
            "cpu_usage": { "total_usage": stats.cpu_us * 1000 },
            "system_cpu_usage": host_cpu_time(),
            "online_cpus": cpus,
        },
        "precpu_stats": { "cpu_usage": { "total_usage": 0 } },
        "memory_stats": {
            "usage": stats.private * 1024,
            "limit": record.spec.memory,
            "stats": {},
        },
        "pids_stats": {},
        "networks": {},
        "blkio_stats": {},
    })
}

/// All of the host's processors' time, in nanoseconds (proc_stat(5)).
fn host_cpu_time() -> u64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = stat.lines().next().unwrap_or_default();
    let ticks = line.split_whitespace().skip(1).take(8);
    let ticks: u64 = ticks.filter_map(|tick| tick.parse::<u64>().ok()).sum();
    ticks.saturating_mul(1_000_000_000) / rustix::param::clock_ticks_per_second().max(1)
}
