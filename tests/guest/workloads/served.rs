//! Servers as others find them: by a published port of the host, and by name.

use super::{SETUP_PATIENCE, Workload};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// Sends this to a port of the host until the answer has that in it.
fn is_answered(port: u16, question: &[u8], answer: &str) {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        stream.write_all(question)?;
        let mut said = [0; 4096];
        let count = stream.read(&mut said)?;
        Ok(String::from_utf8_lossy(&said[..count]).into_owned())
    };
    let deadline = Instant::now() + SETUP_PATIENCE;
    while !ask().is_ok_and(|said| said.contains(answer)) {
        assert!(Instant::now() < deadline, "port {port} does not answer");
        std::thread::sleep(Duration::from_secs(2));
    }
}

/// What a command in one more container of the image, on the same network, prints.
fn client(workload: &Workload, command: &[&str]) -> String {
    let words = [
        "run",
        "--rm",
        "--network",
        "app",
        "--entrypoint",
        "",
        &workload.image,
    ];
    workload.does(&[&words, command].concat())
}

#[test]
fn redis_by_a_port_and_by_name() {
    let redis = Workload::new("redis");
    redis.does(&["network", "create", "app"]);
    redis.starts(
        &["--network", "app", "-p", "26379:6379"],
        &["--protected-mode", "no", "--bind", "0.0.0.0"],
    );
    is_answered(26379, b"SET key kept\r\n", "+OK");
    let command = ["redis-cli", "-h", "it", "get", "key"];
    assert_eq!(client(&redis, &command), "kept\n");
    redis.stops_with("0\n");
}

#[test]
fn nginx_by_a_port_and_by_name() {
    const ASK: &str =
        "exec 3<>/dev/tcp/it/80; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3 | tail -n 1";
    let nginx = Workload::new("nginx");
    nginx.does(&["network", "create", "app"]);
    nginx.starts(&["--network", "app", "-p", "28080:80"], &[]);
    is_answered(28080, b"GET / HTTP/1.0\r\n\r\n", "200 OK");
    assert_eq!(client(&nginx, &["bash", "-c", ASK]), "served by nginx\n");
    nginx.stops_with("0\n");
}

#[test]
fn postgres_by_a_port_and_by_name() {
    let postgres = Workload::new("postgres");
    postgres.does(&["network", "create", "app"]);
    postgres.starts(&["--network", "app", "-p", "25432:5432"], &[]);
    // SSLRequest (PostgreSQL's protocol, 55.7): it answers with one letter.
    is_answered(25432, &[0, 0, 0, 8, 4, 210, 22, 47], "N");
    let open = "echo 'host all all all trust' >> $PGDATA/pg_hba.conf
        psql -U postgres -qc 'select pg_reload_conf()'";
    postgres.execs(&["sh", "-c", open]);
    let command = [
        "psql",
        "-h",
        "it",
        "-U",
        "postgres",
        "-qtA",
        "-c",
        "select 6 * 7",
    ];
    assert_eq!(client(&postgres, &command), "42\n");
    postgres.stops_with("0\n");
}
