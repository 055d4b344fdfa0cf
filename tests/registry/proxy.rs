//! A way to a registry on which things go wrong.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Bytes that are passed on at once.
const PIECE: u64 = 64 << 10;

/// What goes wrong. Offsets count what clients were sent, over all connections.
#[derive(Clone, Default)]
pub struct Faults {
    /// A wait after each piece.
    pub pause: Duration,
    /// Where the connection is cut.
    pub cuts: Vec<u64>,
    /// The byte that is changed.
    pub flip: Option<u64>,
}

/// A proxy of TCP connections.
pub struct Proxy {
    /// Host and port.
    pub address: String,
    sent: Arc<AtomicU64>,
}

impl Proxy {
    pub fn start(target: &str, faults: Faults) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let sent = Arc::new(AtomicU64::new(0));
        let (target, count) = (target.to_owned(), Arc::clone(&sent));
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let server = TcpStream::connect(&target).unwrap();
                let (client_in, server_out) =
                    (client.try_clone().unwrap(), server.try_clone().unwrap());
                let (faults, count) = (faults.clone(), Arc::clone(&count));
                std::thread::spawn(move || up(client_in, server_out));
                std::thread::spawn(move || down(server, client, &faults, &count));
            }
        });
        Proxy { address, sent }
    }

    /// Bytes that clients were sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::SeqCst)
    }
}

fn up(mut client: TcpStream, mut server: TcpStream) {
    std::io::copy(&mut client, &mut server).ok();
    server.shutdown(Shutdown::Write).ok();
}

fn down(mut server: TcpStream, mut client: TcpStream, faults: &Faults, count: &AtomicU64) {
    let mut buffer = vec![0; PIECE as usize];
    loop {
        let start = count.load(Ordering::SeqCst);
        let cut = faults.cuts.iter().find(|cut| **cut > start);
        let room = cut.map_or(PIECE, |cut| PIECE.min(cut - start)) as usize;
        let length = match server.read(&mut buffer[..room]) {
            Ok(0) | Err(_) => break,
            Ok(length) => length,
        };
        if let Some(flip) = faults.flip
            && (start..start + length as u64).contains(&flip)
        {
            buffer[(flip - start) as usize] ^= 1;
        }
        count.fetch_add(length as u64, Ordering::SeqCst);
        if client.write_all(&buffer[..length]).is_err() {
            break;
        }
        if cut.is_some_and(|cut| start + length as u64 == *cut) {
            break;
        }
        std::thread::sleep(faults.pause);
    }
    // The end of the stream, and no reset: what was sent arrives.
    client.shutdown(Shutdown::Both).ok();
    server.shutdown(Shutdown::Both).ok();
}
