//! Volumes: on an ext4 in the place of the host's file server.

use crate::cases::{Case, cases};
use crate::host::{Agent, Images, Loop, Outcome, outcome, shell};
use std::fs;
use std::path::Path;
use vm_run_abi::protocol::{CONTAINER, Event, ExitStatus, Mount, StartFailure};

pub const ALL: &[Case] = cases![
    volumes_are_in_their_places_and_nothing_else_of_them,
    a_read_only_volume_takes_no_writes,
    links_in_the_container_lead_nowhere_else,
    an_empty_volume_gets_what_the_image_has,
    what_does_not_fit_is_refused_in_one_line,
];

/// Directories 0 and 2, and a file 1.
fn volumes(images: &Images, name: &str) -> Loop {
    let dir = images.dir.join(format!("{name}-content"));
    fs::create_dir_all(dir.join("0/inner")).unwrap();
    fs::write(dir.join("0/zero"), "zero\n").unwrap();
    fs::write(dir.join("1"), "one\n").unwrap();
    fs::create_dir(dir.join("2")).unwrap();
    images.filled(name, Path::new(&dir))
}

fn mount(volume: u32, target: &str) -> Mount {
    Mount {
        volume,
        target: target.to_owned(),
        ..Mount::default()
    }
}

fn run(images: &Images, disk: &Loop, mounts: Vec<Mount>, script: &str) -> Outcome {
    let mut agent = Agent::start_with_volumes(images, &images.busybox, "/dev/null", &disk.0);
    let (mut container, process) = shell(script);
    container.volumes = mounts;
    outcome(&mut agent, (container, process))
}

/// The output of a script that does what it should.
fn said(images: &Images, disk: &Loop, mounts: Vec<Mount>, script: &str) -> String {
    let outcome = run(images, disk, mounts, script);
    let exited = Event::Exited {
        process: CONTAINER,
        status: ExitStatus::Code(0),
    };
    assert_eq!(outcome.events.last(), Some(&exited), "{outcome:?}");
    outcome.stdout
}

fn volumes_are_in_their_places_and_nothing_else_of_them(images: &Images) {
    let disk = volumes(images, "places");
    let mounts = vec![
        mount(2, "/made/for/it"),
        mount(0, "/made/for"),
        mount(1, "/etc/hosts"),
        mount(1, "/a/file"),
        mount(0, "/dev/shm"),
    ];
    let script = "ls /made/for; cat /etc/hosts /a/file /dev/shm/zero; ls /mnt
        echo new > /made/for/it/new; touch /made/for/touched
        grep -c ext4 /proc/mounts; awk '$3 == \"ext4\" {print $2}' /proc/mounts";
    let out = said(images, &disk, mounts, script);
    let mut lines = out.lines();
    let expected = ["inner", "it", "zero", "one", "one", "zero", "5"];
    for wanted in expected {
        assert_eq!(lines.next(), Some(wanted), "{out}");
    }
    let places: Vec<&str> = lines.collect();
    let wanted = [
        "/a/file",
        "/made/for",
        "/made/for/it",
        "/etc/hosts",
        "/dev/shm",
    ];
    for place in wanted {
        assert!(places.contains(&place), "{place}: {places:?}");
    }
    // It is there for the next one.
    let out = said(
        images,
        &disk,
        vec![mount(2, "/v"), mount(0, "/w")],
        "cat /v/new; ls /w",
    );
    assert_eq!(out, "new\ninner\nit\ntouched\nzero\n");
}

fn a_read_only_volume_takes_no_writes(images: &Images) {
    let disk = volumes(images, "read-only");
    let mut read_only = mount(0, "/v");
    read_only.read_only = true;
    let script = "touch /v/x || echo refused; mount -o remount,rw /v 2> /dev/null || echo refused
        touch /w/x && ls /v";
    let out = said(images, &disk, vec![read_only, mount(0, "/w")], script);
    assert_eq!(out, "refused\nrefused\ninner\nx\nzero\n");
}

/// /etc/hosts of the image is a link to /tmp/elsewhere, and /home/web/up one upwards.
fn links_in_the_container_lead_nowhere_else(images: &Images) {
    let disk = volumes(images, "links");
    // The first volume brings a link, and the second is to lie behind it.
    let first = said(
        images,
        &disk,
        vec![mount(0, "/v")],
        "ln -s /../../../tmp /v/out; ln -s /etc /v/etc",
    );
    assert_eq!(first, "");
    let mounts = vec![
        mount(0, "/v"),
        mount(2, "/v/out/deep"),
        mount(1, "/v/etc/one"),
    ];
    let script = "cat /etc/one; ls -d /tmp/deep; awk '$3 == \"ext4\" {print $2}' /proc/mounts";
    let out = said(images, &disk, mounts, script);
    assert_eq!(out, "one\n/tmp/deep\n/v\n/tmp/deep\n/etc/one\n");
    assert!(!Path::new("/tmp/deep").exists() && !Path::new("/etc/one").exists());
}

fn an_empty_volume_gets_what_the_image_has(images: &Images) {
    let disk = volumes(images, "copy");
    let copied = |volume, target: &str| Mount {
        copy_up: true,
        ..mount(volume, target)
    };
    let script = "head -1 /etc/group; ls -l /etc/hosts | sed 's/.*-> //'
        stat -c %a:%u:%g /etc/passwd /tmp; echo mine > /etc/group; ls /home";
    let mounts = vec![copied(2, "/etc"), copied(0, "/home")];
    let out = said(images, &disk, mounts, script);
    // 0 is not empty, so it is as it is. And the files with the hostname lie on top.
    let hosts = out.lines().nth(1).unwrap_or_default();
    assert!(hosts.contains("/etc/hosts"), "{out}");
    let rest: Vec<&str> = out.lines().filter(|line| *line != hosts).collect();
    assert_eq!(rest, ["root:x:0:", "644:0:0", "1777:0:0", "inner", "zero"]);
    // Once only.
    let out = said(images, &disk, vec![copied(2, "/etc")], "cat /etc/group");
    assert_eq!(out, "mine\n");
}

fn what_does_not_fit_is_refused_in_one_line(images: &Images) {
    let disk = volumes(images, "fit");
    for (wrong, says) in [
        (mount(1, "/bin"), "a directory"),
        (mount(0, "/bin/busybox"), "no directory"),
        (mount(7, "/v"), "cannot take the volume of /v"),
        (mount(0, "v"), "begins with no /"),
    ] {
        let outcome = run(images, &disk, vec![wrong], "true");
        let [
            Event::StartFailed {
                reason, message, ..
            },
        ] = &outcome.events[..]
        else {
            panic!("{outcome:?}");
        };
        assert_eq!(*reason, StartFailure::Other);
        assert!(
            message.contains(says) && !message.contains('\n'),
            "{message}"
        );
    }
}
