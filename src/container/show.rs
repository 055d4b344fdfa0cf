//! Containers as people and tools see them.

use super::engine::Engine;
use super::health::Health;
use super::id;
use super::record::{Layer, Record, RestartPolicy, Spec, State, Status};
use super::wire::Stats;
use crate::net;
use anyhow::Result;
use indicatif::HumanDuration;
use jiff::Timestamp;
use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::time::Duration;

/// Characters of a command that a table has room for.
const COMMAND_WIDTH: usize = 20;

/// An id for each line.
///
/// # Errors
/// An output that is closed.
pub fn ids(records: &[Record], whole: bool, out: &mut impl Write) -> Result<()> {
    for record in records {
        writeln!(out, "{}", shown_id(record, whole))?;
    }
    Ok(())
}

/// Docker's table.
///
/// # Errors
/// An output that is closed.
pub fn table(records: &[Record], whole: bool, out: &mut impl Write) -> Result<()> {
    let header = [
        "CONTAINER ID",
        "IMAGE",
        "COMMAND",
        "CREATED",
        "STATUS",
        "PORTS",
        "NAMES",
    ];
    let mut rows = vec![header.map(str::to_owned)];
    rows.extend(records.iter().map(|record| {
        [
            shown_id(record, whole).to_owned(),
            record.spec.image.clone(),
            command(record, whole),
            format!("{} ago", age(record.spec.created)),
            status(&record.state),
            net::ports_column(record),
            record.name.clone(),
        ]
    }));
    columns(&rows, out)
}

/// Each after the one that it was forked from, with its name indented. The source of one
/// may be gone.
pub fn as_tree(records: Vec<Record>) -> Vec<Record> {
    let ids: HashSet<String> = records.iter().map(|record| record.id.clone()).collect();
    let parent = |record: &Record| {
        let origin = record.spec.origin.as_ref();
        origin
            .map(|origin| &origin.id)
            .filter(|id| ids.contains(*id))
            .cloned()
    };
    let mut below: HashMap<Option<String>, Vec<Record>> = HashMap::new();
    for record in records {
        below.entry(parent(&record)).or_default().push(record);
    }
    let mut tree = Vec::new();
    // Those that are still to be looked at, the next one last; and how deep they are.
    let mut left: Vec<(usize, Record)> = Vec::new();
    let mut enter = |left: &mut Vec<(usize, Record)>, depth, of: Option<String>| {
        let children = below.remove(&of).unwrap_or_default();
        left.extend(children.into_iter().rev().map(|record| (depth, record)));
    };
    enter(&mut left, 0, None);
    while let Some((depth, mut record)) = left.pop() {
        enter(&mut left, depth + 1, Some(record.id.clone()));
        if depth > 0 {
            record.name = format!("{}└ {}", "  ".repeat(depth - 1), record.name);
        }
        tree.push(record);
    }
    tree
}

/// Rows as columns of a width, the last one as it is.
///
/// # Errors
/// An output that is closed.
pub fn columns<const N: usize>(rows: &[[String; N]], out: &mut impl Write) -> Result<()> {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: [usize; N] = std::array::from_fn(|column| width(column).unwrap_or_default());
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            line += &format!("{cell:width$}   ");
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

fn shown_id(record: &Record, whole: bool) -> &str {
    if whole {
        &record.id
    } else {
        id::short(&record.id)
    }
}

fn command(record: &Record, whole: bool) -> String {
    let line = record.spec.args.join(" ");
    let line: String = line.chars().flat_map(char::escape_debug).collect();
    if whole || line.chars().count() <= COMMAND_WIDTH {
        return format!("\"{line}\"");
    }
    let start: String = line.chars().take(COMMAND_WIDTH - 1).collect();
    format!("\"{start}…\"")
}

/// Docker's words for where a container stands.
pub fn status(state: &State) -> String {
    let since = |at: Option<Timestamp>| at.map_or_else(|| "some time".to_owned(), age);
    match state.status {
        Status::Created => "Created".to_owned(),
        Status::Running => {
            let health = state.health.as_ref().map_or("", Health::words);
            format!("Up {}{health}", since(state.started))
        }
        Status::Paused => format!("Up {} (Paused)", since(state.started)),
        Status::Restarting => format!(
            "Restarting ({}) {} ago",
            state.exit_code,
            since(state.finished)
        ),
        Status::Exited => format!("Exited ({}) {} ago", state.exit_code, since(state.finished)),
    }
}

fn age(at: Timestamp) -> String {
    let elapsed = Timestamp::now().duration_since(at);
    let elapsed = Duration::try_from(elapsed).unwrap_or_default();
    HumanDuration(Duration::from_secs(elapsed.as_secs())).to_string()
}

/// One array of docker's objects, as far as they have a meaning here.
///
/// # Errors
/// An output that is closed.
pub fn json(engine: &Engine, records: &[Record], out: &mut impl Write) -> Result<()> {
    let all: Vec<Value> = records
        .iter()
        .map(|record| object(engine, record))
        .collect();
    Ok(writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?)
}

/// Docker's zero of time.
const NEVER: &str = "0001-01-01T00:00:00Z";

/// A container as docker describes it, as far as that has a meaning here.
pub fn object(engine: &Engine, record: &Record) -> Value {
    let (spec, state) = (&record.spec, &record.state);
    let time = |at: Option<Timestamp>| at.map_or(NEVER.to_owned(), |at| at.to_string());
    let status = state.status;
    let (path, args) = match spec.args.split_first() {
        Some((path, args)) => (path.as_str(), args),
        None => ("", &[][..]),
    };
    let (restart, most) = match spec.restart {
        RestartPolicy::No => ("no", 0),
        RestartPolicy::Always => ("always", 0),
        RestartPolicy::UnlessStopped => ("unless-stopped", 0),
        RestartPolicy::OnFailure(most) => ("on-failure", most),
    };
    let mut object = json!({
        "Id": record.id,
        "Name": format!("/{}", record.name),
        "Created": spec.created.to_string(),
        "Path": path,
        "Args": args,
        "Image": spec.image_id,
        "LogPath": engine.log_path(record),
        "RestartCount": state.restarts,
        "State": {
            "Status": status.word(),
            "Running": status.is_live(),
            "Paused": status == Status::Paused,
            "Restarting": status == Status::Restarting,
            "ExitCode": state.exit_code,
            "Error": state.error,
            "StartedAt": time(state.started),
            "FinishedAt": time(state.finished),
        },
        "Config": {
            "Hostname": spec.hostname,
            "User": spec.user,
            "Tty": spec.tty,
            "OpenStdin": spec.stdin,
            "StdinOnce": spec.stdin_once,
            "Env": spec.env,
            "Cmd": spec.args,
            "Image": spec.image,
            "WorkingDir": spec.cwd,
            "Labels": spec.labels,
            "StopSignal": spec.stop_signal.to_string(),
            "StopTimeout": spec.stop_timeout,
        },
        "Mounts": engine.mounts(record),
        "HostConfig": {
            "AutoRemove": spec.auto_remove,
            "RestartPolicy": { "Name": restart, "MaximumRetryCount": most },
            "ReadonlyRootfs": spec.writable == Layer::Nothing,
            "StorageOpt": storage_opt(spec),
            "LogConfig": {
                "Type": "json-file",
                "Config": {
                    "max-size": spec.log.max_size.to_string(),
                    "max-file": spec.log.max_files.to_string(),
                },
            },
        },
        "VmRun": {
            "Template": state.template,
            "MachineMemory": spec.memory,
            "MachineCpus": spec.cpus,
            "Domain": spec.domain,
            "Jail": !spec.no_jail,
            "WritableLayer": spec.writable,
            "WritableBytes": engine.disk_bytes(record),
            "Supervisor": state.supervisor,
            "Identity": state.identity,
            "ForkedFrom": spec.origin,
        },
    });
    spec.options.describe(&mut object);
    net::describe(record, &mut object);
    if let Some(health) = &state.health {
        object["State"]["Health"] = health.describe();
    }
    object
}

/// Docker's, which are strings.
fn storage_opt(spec: &Spec) -> Value {
    match spec.writable_size {
        Some(size) => json!({ "size": size.to_string() }),
        None => json!({}),
    }
}

/// What containers cost.
///
/// # Errors
/// An output that is closed.
pub fn stats(rows: &[(Record, Stats)], as_json: bool, out: &mut impl Write) -> Result<()> {
    if as_json {
        let all: Vec<Value> = rows
            .iter()
            .map(|(record, stats)| {
                json!({
                    "Id": record.id,
                    "Name": record.name,
                    "GuestPrivateKiB": stats.guest_private,
                    "PrivateKiB": stats.private,
                    "PssKiB": stats.pss,
                    "RootMappedKiB": stats.root_mapped,
                    "CpuMicroseconds": stats.cpu_us,
                })
            })
            .collect();
        return Ok(writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?);
    }
    let header = [
        "CONTAINER ID",
        "NAME",
        "CPU TIME",
        "GUEST'S OWN",
        "PRIVATE",
        "PSS",
    ];
    let mut table = vec![header.map(str::to_owned)];
    table.extend(rows.iter().map(|(record, stats)| {
        [
            id::short(&record.id).to_owned(),
            record.name.clone(),
            format!("{:.2} s", stats.cpu_us as f64 / 1e6),
            format!("{} KiB", stats.guest_private),
            format!("{} KiB", stats.private),
            format!("{} KiB", stats.pss),
        ]
    }));
    columns(&table, out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_described_in_dockers_words() {
        let mut state = State::default();
        assert_eq!(status(&state), "Created");
        state.status = Status::Exited;
        state.exit_code = 137;
        state.finished = Some(Timestamp::now());
        assert_eq!(status(&state), "Exited (137) 0 seconds ago");
        state.status = Status::Paused;
        state.started = Some(Timestamp::now() - Duration::from_secs(130));
        assert_eq!(status(&state), "Up 2 minutes (Paused)");
    }

    #[test]
    fn columns_are_as_wide_as_their_widest() {
        let rows = [["A", "B"], ["long", "x"], ["é", ""]].map(|row| row.map(str::to_owned));
        let mut out = Vec::new();
        columns(&rows, &mut out).expect("written");
        let out = String::from_utf8(out).expect("text");
        assert_eq!(out, "A      B\nlong   x\né\n");
    }
}
