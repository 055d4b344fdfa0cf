//! A client that says exactly what it is told to.

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Client(BufReader<UnixStream>);

/// What comes before a body.
pub struct Head {
    pub status: u16,
    headers: Vec<(String, String)>,
}

pub struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
    head: Head,
}

impl Head {
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        headers
            .find(|(found, _)| found == name)
            .map(|(_, value)| value.as_str())
    }
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.header(name)
    }
}

impl Client {
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).expect("connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        Self(BufReader::new(stream))
    }

    pub fn write(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).expect("is heard");
    }

    /// There will be no more.
    pub fn shut(&mut self) {
        self.0.get_mut().shutdown(Shutdown::Write).expect("ends");
    }

    fn request(&mut self, method: &str, path: &str, headers: &str, body: Option<Value>) {
        let path = path
            .replace('"', "%22")
            .replace('{', "%7B")
            .replace('}', "%7D");
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let len = body.len();
        self.write(
            format!(
                "{method} {path} HTTP/1.1\r\nhost: docker\r\n{headers}\
                 content-type: application/json\r\ncontent-length: {len}\r\n\r\n{body}"
            )
            .as_bytes(),
        );
    }

    pub fn send(&mut self, method: &str, path: &str, body: Option<Value>) {
        self.request(method, path, "", body);
    }

    pub fn upgrade(&mut self, path: &str, body: Option<Value>) {
        self.request(
            "POST",
            path,
            "connection: Upgrade\r\nupgrade: tcp\r\n",
            body,
        );
    }

    pub fn ask(mut self, method: &str, path: &str, body: Option<Value>) -> Answer {
        self.send(method, path, body);
        self.answer(method == "HEAD")
    }

    pub fn raw(mut self, bytes: &[u8]) -> Answer {
        self.write(bytes);
        self.answer(false)
    }

    fn answer(mut self, is_head: bool) -> Answer {
        let head = self.head();
        let body = match is_head {
            true => Vec::new(),
            false => self.body(&head),
        };
        Answer {
            status: head.status,
            body,
            head,
        }
    }

    pub fn head(&mut self) -> Head {
        let mut line = || {
            let mut line = String::new();
            self.0.read_line(&mut line).expect("reads");
            line.trim_end().to_owned()
        };
        let first = line();
        let status = first
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        let status = status.unwrap_or_else(|| panic!("no answer: {first:?}"));
        let mut headers = Vec::new();
        loop {
            let line = line();
            let Some((name, value)) = line.split_once(':') else {
                return Head { status, headers };
            };
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }

    fn body(&mut self, head: &Head) -> Vec<u8> {
        if head.header("transfer-encoding") == Some("chunked") {
            return self.chunks();
        }
        let len = head
            .header("content-length")
            .map_or(0, |len| len.parse().expect("a number"));
        let mut body = vec![0; len];
        self.0.read_exact(&mut body).expect("reads");
        body
    }

    fn chunks(&mut self) -> Vec<u8> {
        let mut body = Vec::new();
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line).expect("reads");
            let len = usize::from_str_radix(line.trim_end(), 16).expect("a length");
            let mut chunk = vec![0; len + 2];
            self.0.read_exact(&mut chunk).expect("reads");
            body.extend_from_slice(&chunk[..len]);
            if len == 0 {
                return body;
            }
        }
    }

    /// The body behind a head.
    pub fn json(&mut self, head: &Head) -> Value {
        serde_json::from_slice(&self.body(head)).expect("JSON")
    }
}

impl Read for Client {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(into)
    }
}
