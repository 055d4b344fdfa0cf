//! A server of HTTP that says what a test tells it to, for registries that no honest
//! program would be.

use super::archive::digest;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// A request, without its body.
#[derive(Clone, Debug)]
pub struct Request {
    /// The path, and the query behind its `?`.
    pub path: String,
    /// By name in lower case.
    pub headers: HashMap<String, String>,
}

/// An answer.
#[derive(Default)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    /// Its length by the head, where that is not its own.
    pub promised: Option<usize>,
    /// The body is sent again and again, for ever.
    pub endless: bool,
}

/// A server, which lives as long as the test's process.
pub struct Http {
    /// Host and port.
    pub address: String,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl Http {
    pub fn serve(handler: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Http {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (log, handler) = (Arc::clone(&seen), Arc::new(handler));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (log, handler) = (Arc::clone(&log), Arc::clone(&handler));
                std::thread::spawn(move || {
                    let request = read(&stream);
                    log.lock().unwrap().push(request.clone());
                    write(stream, handler(&request)).ok();
                });
            }
        });
        Http { address, seen }
    }

    /// The paths that were asked for so far.
    pub fn paths(&self) -> Vec<String> {
        let seen = self.seen.lock().unwrap();
        seen.iter().map(|request| request.path.clone()).collect()
    }
}

fn read(stream: &TcpStream) -> Request {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let first = lines.next().unwrap_or_default();
    let headers = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_ascii_lowercase(), value.trim().to_owned()))
        })
        .collect();
    Request {
        path: first.split(' ').nth(1).unwrap_or_default().to_owned(),
        headers,
    }
}

fn write(mut stream: TcpStream, answer: Answer) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {} x\r\nConnection: close\r\n", answer.status);
    if !answer.endless {
        head += &format!(
            "Content-Length: {}\r\n",
            answer.promised.unwrap_or(answer.body.len())
        );
    }
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all(head.as_bytes())?;
    stream.write_all(b"\r\n")?;
    stream.write_all(&answer.body)?;
    if !answer.endless {
        return Ok(());
    }
    loop {
        stream.write_all(&answer.body)?;
    }
}

/// What a registry of one repository, `x`, holds: blobs and manifests by digest, and
/// tags.
#[derive(Clone, Default)]
pub struct Content {
    by_digest: HashMap<String, Vec<u8>>,
    tags: HashMap<String, Vec<u8>>,
}

impl Content {
    /// Adds a blob or a manifest; returns its digest.
    pub fn add(&mut self, bytes: &[u8]) -> String {
        let digest = digest(bytes);
        self.by_digest.insert(digest.clone(), bytes.to_vec());
        digest
    }

    /// What is served under a digest that is another's.
    pub fn lie(&mut self, digest: &str, bytes: &[u8]) {
        self.by_digest.insert(digest.to_owned(), bytes.to_vec());
    }

    /// Gives a manifest a tag.
    pub fn tag(&mut self, tag: &str, manifest: &[u8]) {
        self.tags.insert(tag.to_owned(), manifest.to_vec());
        self.add(manifest);
    }

    /// The honest answer, without ranges.
    pub fn answer(&self, request: &Request) -> Answer {
        let last = request.path.rsplit('/').next().unwrap_or_default();
        let body = match request.path.as_str() {
            "/v2/" => Some(&b"{}"[..]),
            _ => self
                .by_digest
                .get(last)
                .or_else(|| self.tags.get(last))
                .map(Vec::as_slice),
        };
        match body {
            Some(body) => Answer {
                status: 200,
                body: body.to_vec(),
                ..Answer::default()
            },
            None => Answer {
                status: 404,
                ..Answer::default()
            },
        }
    }
}
