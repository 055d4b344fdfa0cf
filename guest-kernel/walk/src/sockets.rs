//! Every socket family with every type, and the protocols that have a name.

use crate::kernel::{Answer, call, probe};

#[rustfmt::skip]
const FAMILIES: &[(u64, &str)] = &[
    (1, "unix"), (2, "inet"), (3, "ax25"), (4, "ipx"), (5, "appletalk"), (6, "netrom"), (7, "bridge"),
    (8, "atmpvc"), (9, "x25"), (10, "inet6"), (11, "rose"), (12, "decnet"), (13, "netbeui"),
    (14, "security"), (15, "key"), (16, "netlink"), (17, "packet"), (18, "ash"), (19, "econet"),
    (20, "atmsvc"), (21, "rds"), (22, "sna"), (23, "irda"), (24, "pppox"), (25, "wanpipe"), (26, "llc"),
    (27, "ib"), (28, "mpls"), (29, "can"), (30, "tipc"), (31, "bluetooth"), (32, "iucv"), (33, "rxrpc"),
    (34, "isdn"), (35, "phonet"), (36, "ieee802154"), (37, "caif"), (38, "alg"), (39, "nfc"),
    (40, "vsock"), (41, "kcm"), (42, "qipcrtr"), (43, "smc"), (44, "xdp"), (45, "mctp"),
];

const TYPES: &[(u64, &str)] = &[
    (1, "stream"),
    (2, "dgram"),
    (3, "raw"),
    (4, "rdm"),
    (5, "seqpacket"),
    (6, "dccp"),
    (10, "packet"),
];

const STREAM: u64 = 1;
const DGRAM: u64 = 2;
const RAW: u64 = 3;
const SEQPACKET: u64 = 5;

/// Protocols beyond a family's default: family, type, protocol, name.
#[rustfmt::skip]
const PROTOCOLS: &[(u64, u64, u64, &str)] = &[
    (2, STREAM, 132, "inet stream sctp"), (2, SEQPACKET, 132, "inet seqpacket sctp"),
    (10, STREAM, 132, "inet6 stream sctp"), (10, SEQPACKET, 132, "inet6 seqpacket sctp"),
    (2, DGRAM, 1, "inet dgram icmp"), (10, DGRAM, 58, "inet6 dgram icmpv6"),
    (2, RAW, 1, "inet raw icmp"), (10, RAW, 58, "inet6 raw icmpv6"),
    (2, RAW, 255, "inet raw raw"), (10, RAW, 255, "inet6 raw raw"),
    (2, DGRAM, 136, "inet dgram udplite"), (10, DGRAM, 136, "inet6 dgram udplite"),
    (2, 6, 33, "inet dccp dccp"), (10, 6, 33, "inet6 dccp dccp"),
    (2, DGRAM, 115, "inet dgram l2tp"), (10, DGRAM, 115, "inet6 dgram l2tp"),
    (2, STREAM, 262, "inet stream mptcp"), (10, STREAM, 262, "inet6 stream mptcp"),
    (2, STREAM, 256, "inet stream smc"), (10, STREAM, 256, "inet6 stream smc"),
    (17, RAW, 0x0300, "packet raw all"), (17, DGRAM, 0x0300, "packet dgram all"),
    (24, STREAM, 1, "pppox stream l2tp"), (24, STREAM, 2, "pppox stream pptp"),
    (29, RAW, 1, "can raw raw"), (29, DGRAM, 2, "can dgram bcm"), (29, DGRAM, 6, "can dgram isotp"),
    (29, DGRAM, 7, "can dgram j1939"),
    (33, DGRAM, 2, "rxrpc dgram inet"), (33, DGRAM, 10, "rxrpc dgram inet6"),
    (43, STREAM, 1, "smc stream smc6"),
];

#[rustfmt::skip]
const NETLINK: &[(u64, &str)] = &[
    (0, "route"), (2, "usersock"), (3, "firewall"), (4, "sock_diag"), (5, "nflog"), (6, "xfrm"),
    (7, "selinux"), (8, "iscsi"), (9, "audit"), (10, "fib_lookup"), (11, "connector"), (12, "netfilter"),
    (13, "ip6_fw"), (14, "dnrtmsg"), (15, "kobject_uevent"), (16, "generic"), (18, "scsitransport"),
    (19, "ecryptfs"), (20, "rdma"), (21, "crypto"), (22, "smc"),
];

/// One line for each.
pub fn walk(line: &mut dyn FnMut(String, String)) {
    for &(family, family_name) in FAMILIES {
        for &(kind, kind_name) in TYPES {
            line(
                format!("socket {family_name} {kind_name}"),
                probe(|| socket(family, kind, 0)),
            );
        }
    }
    for &(family, kind, protocol, name) in PROTOCOLS {
        line(
            format!("socket {name}"),
            probe(|| socket(family, kind, protocol)),
        );
    }
    for &(protocol, name) in NETLINK {
        line(
            format!("socket netlink raw {name}"),
            probe(|| socket(16, RAW, protocol)),
        );
    }
}

fn socket(family: u64, kind: u64, protocol: u64) -> Answer {
    call(libc::SYS_socket, &[family, kind, protocol])
}
