//! Docker's API over an engine that is none: what is HTTP's and docker's alone.

mod client;
mod fake;

use client::{Client, Head};
use docker_api::Limits;
use fake::Fake;
use serde_json::{Value, json};
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// A server in a thread.
struct Served {
    socket: PathBuf,
    engine: Arc<Fake>,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

impl Served {
    fn start(limits: Limits) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("socket");
        let engine = Arc::new(Fake::default());
        let (end, ends) = oneshot::channel();
        let (at, behind) = (socket.clone(), Arc::clone(&engine));
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .build();
            runtime.expect("a runtime").block_on(async {
                let listener = tokio::net::UnixListener::bind(at).expect("listens");
                ready.send(()).expect("is waited for");
                let ends = async {
                    ends.await.ok();
                };
                docker_api::serve(listener, behind, limits, ends).await;
            });
        });
        is_ready.recv().expect("listens");
        Self {
            socket,
            engine,
            end: Some(end),
            thread: Some(thread),
            _directory: directory,
        }
    }

    fn connect(&self) -> Client {
        Client::connect(&self.socket)
    }

    /// What is answered, and with which status.
    fn ask(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let answer = self.connect().ask(method, path, body);
        let body = match answer.body.is_empty() {
            true => Value::Null,
            false => serde_json::from_slice(&answer.body).unwrap_or_else(|_| {
                Value::String(String::from_utf8_lossy(&answer.body).into_owned())
            }),
        };
        (answer.status, body)
    }

    /// Makes a container, `one`, and waits for its end: a client that has heard that it does.
    fn wait_for_one(&self) -> (Client, Head) {
        let body = json!({"Image": "i"});
        self.ask("POST", "/containers/create?name=one", Some(body));
        let mut waiting = self.connect();
        waiting.send("POST", "/containers/one/wait?condition=next-exit", None);
        let head = waiting.head();
        (waiting, head)
    }

    fn end(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("ends in order");
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.end();
    }
}

fn served() -> Served {
    Served::start(Limits::default())
}

fn message(body: &Value) -> &str {
    body["message"]
        .as_str()
        .unwrap_or_else(|| panic!("no message: {body}"))
}

#[test]
fn versions_are_negotiated_as_dockers_clients_do() {
    let served = served();
    for method in ["GET", "HEAD"] {
        let pong = served.connect().ask(method, "/_ping", None);
        assert_eq!(pong.status, 200);
        assert_eq!(pong.header("api-version"), Some(docker_api::API_VERSION));
        assert_eq!(pong.header("ostype"), Some("linux"));
    }
    for path in ["/version", "/v1.24/version", "/v1.47/version"] {
        let (status, body) = served.ask("GET", path, None);
        assert_eq!(
            (status, &body["ApiVersion"]),
            (200, &json!(docker_api::API_VERSION))
        );
    }
    let (status, body) = served.ask("GET", "/v1.99/version", None);
    assert_eq!(status, 400);
    assert!(
        message(&body).contains("client version 1.99 is too new"),
        "{body}"
    );
    let (status, body) = served.ask("GET", "/v1.12/version", None);
    assert_eq!(status, 400);
    assert!(
        message(&body).contains("client version 1.12 is too old"),
        "{body}"
    );
}

#[test]
fn what_is_wrong_has_dockers_form() {
    let served = served();
    for (method, path, body, status) in [
        ("GET", "/containers/nobody/json", None, 404),
        ("GET", "/nothing", None, 404),
        ("POST", "/build", None, 501),
        ("GET", "/v1.40/swarm", None, 501),
        ("PUT", "/containers/json", None, 501),
        ("GET", "/containers/json?filters={", None, 400),
        (
            "GET",
            "/containers/json?filters={\"no\":[\"x\"]}",
            None,
            400,
        ),
        ("POST", "/containers/a/resize?h=x&w=1", None, 400),
        ("POST", "/containers/a/wait?condition=never", None, 400),
        ("GET", "/containers/a/logs", None, 400),
        ("POST", "/containers/create", Some(json!({"Image": 7})), 400),
        ("POST", "/containers/a/exec", Some(json!({"Cmd": []})), 400),
        ("POST", "/exec/nobody/start", Some(json!({})), 404),
    ] {
        let (found, body) = served.ask(method, path, body);
        assert_eq!(found, status, "{method} {path}: {body}");
        assert!(!message(&body).contains('\n'), "{body}");
    }
    let answer = served.connect().raw(b"POST /containers/create HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1\r\n\r\n{");
    assert_eq!(answer.status, 400);
}

#[test]
fn a_container_is_made_listed_ended_and_removed() {
    let served = served();
    let body = json!({"Image": "alpine", "Cmd": ["sh"], "Labels": {"a": "b"}});
    let (status, made) = served.ask(
        "POST",
        "/v1.40/containers/create?name=one",
        Some(body.clone()),
    );
    assert_eq!(status, 201);
    let id = made["Id"].as_str().expect("an id");
    let (status, taken) = served.ask("POST", "/containers/create?name=one", Some(body));
    assert_eq!(status, 409, "{taken}");
    let list = |query: &str| {
        let (status, body) = served.ask("GET", &format!("/containers/json{query}"), None);
        assert_eq!(status, 200, "{body}");
        body.as_array().expect("a list").len()
    };
    assert_eq!((list(""), list("?all=1"), list("?limit=5")), (0, 1, 1));
    for (filter, found) in [
        (r#"{"status":["created"]}"#, 1),
        (r#"{"status":{"running":true}}"#, 0),
        (r#"{"name":["on"]}"#, 1),
        (r#"{"label":["a=b"]}"#, 1),
        (r#"{"label":["a=b","c"]}"#, 0),
        (r#"{"ancestor":["alpine"]}"#, 1),
        (r#"{"ancestor":["debian"]}"#, 0),
    ] {
        assert_eq!(list(&format!("?all=1&filters={filter}")), found, "{filter}");
    }
    let act = |path: &str| {
        served
            .ask("POST", &format!("/containers/{id}/{path}"), None)
            .0
    };
    assert_eq!((act("start"), act("start")), (204, 304));
    assert_eq!(list(""), 1);
    assert_eq!((act("stop?t=1"), act("stop")), (204, 304));
    assert_eq!(act("rename?name=two"), 204);
    let remove = || served.ask("DELETE", "/containers/two?force=1&v=1", None).0;
    assert_eq!((remove(), remove()), (204, 404));
}

#[test]
fn networks_and_volumes_are_listed_made_and_removed() {
    let served = served();
    let names = |path: &str, list: &str| {
        let (status, body) = served.ask("GET", path, None);
        assert_eq!(status, 200, "{body}");
        let all = if list.is_empty() { &body } else { &body[list] };
        all.as_array().expect("a list").len()
    };
    for (filters, count) in [
        ("", 2),
        (r#"?filters={"type":["custom"]}"#, 1),
        (r#"?filters={"label":["a=b"]}"#, 1),
        (r#"?filters={"name":["none"]}"#, 0),
    ] {
        assert_eq!(
            names(&format!("/networks{filters}"), ""),
            count,
            "{filters}"
        );
    }
    assert_eq!(names("/volumes", "Volumes"), 1);
    assert_eq!(names(r#"/volumes?filters={"name":["x"]}"#, "Volumes"), 0);
    for (method, path, body, status) in [
        ("GET", "/networks/x", None, 404),
        ("POST", "/networks/create", Some(json!({"Name": "x"})), 201),
        ("POST", "/networks/create", Some(json!({})), 400),
        (
            "POST",
            "/networks/x/connect",
            Some(json!({"Container": "x"})),
            404,
        ),
        ("DELETE", "/networks/x", None, 404),
        ("GET", "/volumes/x", None, 404),
        ("POST", "/volumes/create", Some(json!({"Name": "x"})), 201),
        (
            "POST",
            "/volumes/create",
            Some(json!({"Driver": "nfs"})),
            501,
        ),
        ("DELETE", "/volumes/x", None, 404),
        ("DELETE", "/volumes/x?force=1", None, 204),
    ] {
        assert_eq!(served.ask(method, path, body).0, status, "{method} {path}");
    }
}

/// Docker's client waits for the headers before it starts what it waits for.
#[test]
fn a_wait_says_at_once_that_it_waits() {
    let served = served();
    let (mut waiting, head) = served.wait_for_one();
    assert_eq!(head.status, 200);
    served.ask("POST", "/containers/one/start", None);
    served.engine.end("one", 7);
    assert_eq!(waiting.json(&head), json!({"StatusCode": 7}));
}

/// The streams of a process, over a connection that was HTTP: both ways, and half closed.
#[test]
fn a_session_takes_the_connection_over() {
    let served = served();
    for (tty, framed) in [
        (false, &b"\x01\0\0\0\0\0\0\x06HELLO\n"[..]),
        (true, b"HELLO\n"),
    ] {
        let body = json!({"Image": "i", "OpenStdin": true, "Tty": tty});
        let (_, made) = served.ask("POST", "/containers/create", Some(body));
        let id = made["Id"].as_str().expect("an id");
        let mut client = served.connect();
        let path = format!("/containers/{id}/attach?stream=1&stdin=1&stdout=1&stderr=1");
        client.upgrade(&path, None);
        let head = client.head();
        assert_eq!((head.status, head.header("upgrade")), (101, Some("tcp")));
        let kind = head.header("content-type").expect("a type");
        assert_eq!(kind.contains("multiplexed"), !tty, "{kind}");
        client.write(b"hello\n");
        let mut said = vec![0; framed.len()];
        client.read_exact(&mut said).expect("reads");
        assert_eq!(said, framed);
        // The fake ends with its input, and the connection with it.
        client.shut();
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).expect("reads");
        assert!(rest.is_empty(), "{rest:?}");
    }
    let (_, made) = served.ask(
        "POST",
        "/containers/create?name=e",
        Some(json!({"Image": "i"})),
    );
    assert!(made["Id"].is_string());
    served.ask("POST", "/containers/e/start", None);
    let (status, exec) = served.ask("POST", "/containers/e/exec", Some(json!({"Cmd": ["x"]})));
    assert_eq!(status, 201);
    let mut client = served.connect();
    let path = format!("/v1.40/exec/{}/start", exec["Id"].as_str().expect("an id"));
    client.upgrade(&path, Some(json!({"Detach": false, "Tty": false})));
    let head = client.head();
    assert_eq!(head.status, 101);
    // As old clients want it.
    assert_eq!(
        head.header("content-type"),
        Some("application/vnd.docker.raw-stream")
    );
    client.write(b"a");
    let mut said = [0; 9];
    client.read_exact(&mut said).expect("reads");
    assert_eq!(&said, b"\x01\0\0\0\0\0\0\x01A");
}

#[test]
fn what_a_client_does_not_send_holds_up_nobody_for_long() {
    let limits = Limits {
        connections: 2,
        head: Duration::from_millis(300),
        ..Limits::default()
    };
    let served = Served::start(limits);
    let mut silent = [(); 2].map(|()| served.connect());
    for client in &mut silent {
        client.write(b"GET /_ping HT");
    }
    // All places are taken, until their patience ends.
    let begun = Instant::now();
    assert_eq!(served.connect().ask("GET", "/_ping", None).status, 200);
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[test]
fn the_end_lets_what_is_under_way_end_and_takes_no_more() {
    let mut served = served();
    let (mut waiting, head) = served.wait_for_one();
    drop(served.end.take());
    let engine = Arc::clone(&served.engine);
    std::thread::sleep(Duration::from_millis(50));
    engine.end("one", 3);
    assert_eq!(waiting.json(&head), json!({"StatusCode": 3}));
    served.end();
    assert!(std::os::unix::net::UnixStream::connect(&served.socket).is_err());
}

#[test]
fn an_idle_client_does_not_hold_up_the_end() {
    let mut served = served();
    let idle = served.connect();
    let begun = Instant::now();
    served.end();
    assert!(begun.elapsed() < Duration::from_secs(5));
    drop(idle);
}
