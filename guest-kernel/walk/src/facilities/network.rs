//! Addresses, options and filters of sockets, and the kernel's ciphers.

use super::{Probe, c};
use crate::kernel::{Answer, call, out, ptr};
use std::ffi::CStr;

pub const PROBES: &[Probe] = &[
    ("ipv4 tcp on 127.0.0.1", || {
        bound(libc::AF_INET, libc::SOCK_STREAM, 0).map(|_| 0)
    }),
    ("ipv6 tcp on ::1", || {
        bound(libc::AF_INET6, libc::SOCK_STREAM, 0).map(|_| 0)
    }),
    ("ipv6 udp on ::1", || {
        bound(libc::AF_INET6, libc::SOCK_DGRAM, 0).map(|_| 0)
    }),
    ("sctp on 127.0.0.1", || {
        listen(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_SCTP)
    }),
    ("mptcp on 127.0.0.1", || {
        listen(libc::AF_INET, libc::SOCK_STREAM, 262)
    }),
    ("tcp listens", || {
        listen(libc::AF_INET, libc::SOCK_STREAM, 0)
    }),
    ("multicast on ipv4", || {
        let socket = bound(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
        // struct ip_mreq: 224.0.0.251 on the loopback address.
        let request = [224u8, 0, 0, 251, 127, 0, 0, 1];
        option(socket, libc::IPPROTO_IP, libc::IP_ADD_MEMBERSHIP, &request)
    }),
    ("tcp congestion cubic", || congestion(b"cubic")),
    ("tcp congestion reno", || congestion(b"reno")),
    ("tcp congestion bbr", || congestion(b"bbr")),
    ("tcp fast open", || {
        let socket = bound(libc::AF_INET, libc::SOCK_STREAM, 0)?;
        option(socket, libc::IPPROTO_TCP, libc::TCP_FASTOPEN, &5u32)
    }),
    ("tcp md5 signature", || {
        let socket = bound(libc::AF_INET, libc::SOCK_STREAM, 0)?;
        // struct tcp_md5sig, all zero but the family: no such key to delete.
        let mut request = [0u8; 216];
        request[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
        option(socket, libc::IPPROTO_TCP, libc::TCP_MD5SIG, &request)
    }),
    ("tcp layered protocol tls", || {
        let socket = bound(libc::AF_INET, libc::SOCK_STREAM, 0)?;
        option(socket, libc::IPPROTO_TCP, libc::TCP_ULP, b"tls")
    }),
    ("socket filter", || {
        let socket = bound(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
        // struct sock_fprog: one instruction, "return all".
        let instruction = [0x0006u64 | 0xffff << 32];
        let program = [1u64, ptr(&instruction)];
        option(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
    }),
    ("socket to a device", || {
        let socket = bound(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
        option(socket, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"lo\0")
    }),
    ("busy poll", || socket_option(libc::SO_BUSY_POLL, 10)),
    ("zero copy", || {
        let socket = bound(libc::AF_INET, libc::SOCK_STREAM, 0)?;
        option(socket, libc::SOL_SOCKET, libc::SO_ZEROCOPY, &1u32)
    }),
    ("time stamps", || {
        socket_option(libc::SO_TIMESTAMPING, 1 << 3)
    }),
    ("segmentation of udp", || {
        const UDP_SEGMENT: i32 = 103;
        let socket = bound(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
        option(socket, libc::IPPROTO_UDP, UDP_SEGMENT, &1200u32)
    }),
    ("iptables' tables", || {
        let socket = bound(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
        let mut info = [0u8; 84];
        let mut size = 84u32;
        call(
            libc::SYS_getsockopt,
            &[
                socket,
                libc::IPPROTO_IP as u64,
                64,
                out(&mut info),
                out(&mut size),
            ],
        )
    }),
    ("peer's credentials", || {
        let mut pair = [0i32; 2];
        call(
            libc::SYS_socketpair,
            &[
                libc::AF_UNIX as u64,
                libc::SOCK_STREAM as u64,
                0,
                out(&mut pair),
            ],
        )?;
        let mut who = [0u32; 3];
        let mut size = 12u32;
        let level = libc::SOL_SOCKET as u64;
        call(
            libc::SYS_getsockopt,
            &[
                pair[0] as u64,
                level,
                libc::SO_PEERCRED as u64,
                out(&mut who),
                out(&mut size),
            ],
        )
    }),
    ("sockets listed", || {
        const SOCK_DIAG: u64 = 4;
        let socket = call(
            libc::SYS_socket,
            &[libc::AF_NETLINK as u64, libc::SOCK_RAW as u64, SOCK_DIAG],
        )?;
        // nlmsghdr (72 bytes, SOCK_DIAG_BY_FAMILY, REQUEST | DUMP), then
        // inet_diag_req_v2 for TCP over IPv4 in all states.
        let mut request = [0u8; 72];
        request[..8].copy_from_slice(&[72, 0, 0, 0, 20, 0, 1, 3]);
        request[16..18].copy_from_slice(&[libc::AF_INET as u8, libc::IPPROTO_TCP as u8]);
        request[20..24].copy_from_slice(&[255; 4]);
        call(
            libc::SYS_sendto,
            &[socket as u64, ptr(&request), 72, 0, 0, 0],
        )?;
        let mut reply = [0u8; 4096];
        call(
            libc::SYS_recvfrom,
            &[socket as u64, out(&mut reply), 4096, 0, 0, 0],
        )?;
        // An error message has type 2 and its errno, negative, at byte 16.
        if reply[4..6] == [2, 0] {
            return Err(-i32::from_ne_bytes([
                reply[16], reply[17], reply[18], reply[19],
            ]));
        }
        Ok(0)
    }),
    ("vsock to nobody", || {
        let socket = call(
            libc::SYS_socket,
            &[libc::AF_VSOCK as u64, libc::SOCK_STREAM as u64, 0],
        )?;
        // struct sockaddr_vm bound to any address and port.
        let address = [libc::AF_VSOCK as u32, u32::MAX, u32::MAX, 0];
        call(libc::SYS_bind, &[socket as u64, ptr(&address), 16])
    }),
    ("device net/tun", || device(10, 200)),
    ("device cuse", || device(10, 203)),
    ("device fuse", || device(10, 229)),
    ("device ppp", || device(108, 0)),
];

/// Ciphers that common programs ask of `AF_ALG`.
pub const ALGORITHMS: &[(&str, &str)] = &[
    ("hash", "md5"),
    ("hash", "sha1"),
    ("hash", "sha256"),
    ("hash", "sha512"),
    ("hash", "sha3-256"),
    ("hash", "hmac(sha256)"),
    ("hash", "cmac(aes)"),
    ("hash", "crc32c"),
    ("skcipher", "cbc(aes)"),
    ("skcipher", "ctr(aes)"),
    ("skcipher", "ecb(aes)"),
    ("skcipher", "xts(aes)"),
    ("skcipher", "chacha20"),
    ("aead", "gcm(aes)"),
    ("aead", "ccm(aes)"),
    ("aead", "rfc7539(chacha20,poly1305)"),
    ("rng", "stdrng"),
];

/// A socket bound to any port of the loopback address.
fn bound(family: i32, kind: i32, protocol: i32) -> Result<u64, i32> {
    let socket = call(
        libc::SYS_socket,
        &[family as u64, kind as u64, protocol as u64],
    )? as u64;
    let mut address = [0u8; 28];
    address[..2].copy_from_slice(&(family as u16).to_ne_bytes());
    let size = if family == libc::AF_INET {
        address[4..8].copy_from_slice(&[127, 0, 0, 1]);
        16
    } else {
        address[23] = 1;
        28
    };
    call(libc::SYS_bind, &[socket, ptr(&address), size])?;
    Ok(socket)
}

fn listen(family: i32, kind: i32, protocol: i32) -> Answer {
    call(libc::SYS_listen, &[bound(family, kind, protocol)?, 1])
}

fn option<T: ?Sized>(socket: u64, level: i32, name: i32, value: &T) -> Answer {
    let size = size_of_val(value) as u64;
    call(
        libc::SYS_setsockopt,
        &[socket, level as u64, name as u64, ptr(value), size],
    )
}

fn socket_option(name: i32, value: u32) -> Answer {
    let socket = bound(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    option(socket, libc::SOL_SOCKET, name, &value)
}

fn congestion(name: &[u8]) -> Answer {
    let socket = bound(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    option(socket, libc::IPPROTO_TCP, libc::TCP_CONGESTION, name)
}

/// Opens a character device by its number.
fn device(major: u64, minor: u64) -> Answer {
    super::open(device_node(major, minor)?, libc::O_RDWR)
}

/// Makes a node of a character device and tells its path.
pub fn device_node(major: u64, minor: u64) -> Result<&'static CStr, i32> {
    let path = c"/tmp/device";
    let at = libc::AT_FDCWD as u64;
    // One of an earlier probe may be there.
    call(libc::SYS_unlinkat, &[at, c(path), 0]).ok();
    call(
        libc::SYS_mknodat,
        &[
            at,
            c(path),
            u64::from(libc::S_IFCHR | 0o600),
            major << 8 | minor,
        ],
    )?;
    Ok(path)
}

/// Asks for a cipher.
pub fn algorithm(kind: &str, name: &str) -> Answer {
    let socket = call(
        libc::SYS_socket,
        &[libc::AF_ALG as u64, libc::SOCK_SEQPACKET as u64, 0],
    )?;
    // struct sockaddr_alg: family, type[14], feature, mask, name[64].
    let mut address = [0u8; 88];
    address[..2].copy_from_slice(&(libc::AF_ALG as u16).to_ne_bytes());
    address[2..2 + kind.len()].copy_from_slice(kind.as_bytes());
    address[24..24 + name.len()].copy_from_slice(name.as_bytes());
    call(libc::SYS_bind, &[socket as u64, ptr(&address), 88])
}
