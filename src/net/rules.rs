//! Rules of nftables as plain data, and the way of a whole table into the kernel: replaced
//! in one transaction, so that there is never half of one (nft(8)).

use super::links::described;
use ipnet::IpNet;
use netlink_bindings::nftables::{
    Chained, CmpOps, CtKeys, FibFlags, MetaKeys, Nfgenmsg, PayloadBase, PushExprListAttrs,
    PushRuleAttrs, Registers, RejectInetCode, RejectTypes, Request, SetFlags, VerdictCode,
};
use netlink_bindings::traits::Pusher;
use netlink_bindings::utils::{
    RequestBuf, finalize_nested_header, push_header, push_nested_header,
};
use netlink_socket2::NetlinkSocket;
use sha2::{Digest, Sha256};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;

/// A table of the family `inet`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    pub name: String,
    pub maps: Vec<Map>,
    pub chains: Vec<Chain>,
}

/// Rules, and where the kernel asks them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    pub name: &'static str,
    pub hook: Hook,
    /// In their order; what none decides on is accepted.
    pub rules: Vec<Rule>,
}

/// The places that we use: a hook with its usual priority.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Before anything else looks at a packet.
    Raw,
    /// Where destinations are translated.
    DestinationNat,
    /// To this host.
    Input,
    /// Through this host.
    Forward,
    /// Where sources are translated.
    SourceNat,
}

/// What all of `when` fits meets `then`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    pub when: Vec<When>,
    pub then: Then,
}

/// A property of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum When {
    /// It came by this interface, or by one whose name begins so.
    From(Interface),
    /// It did not.
    NotFrom(Interface),
    /// It leaves by it.
    To(Interface),
    /// It does not.
    NotTo(Interface),
    Ipv4,
    Ipv6,
    /// The protocol over IP, by number.
    Protocol(u8),
    Source(IpNet),
    Destination(IpNet),
    /// The destination is an address of this host (or namespace).
    ToUs,
    /// The destination's port, of a protocol that has ports at TCP's place.
    Ports(RangeInclusive<u16>),
    /// It belongs to a connection that is known, or to one that such a one has caused.
    Known,
    /// It belongs to no connection, and begins none.
    Invalid,
    /// Its destination has been translated.
    Translated,
}

/// Interfaces by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Interface {
    Named(String),
    Prefix(&'static str),
}

/// What becomes of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Then {
    Accept,
    Drop,
    /// Its sender is told that it is not allowed.
    Reject,
    /// Its source becomes this host's.
    Masquerade,
    /// Its destination becomes this.
    Redirect(IpAddr),
    /// Its destination becomes what a map has for its protocol and port.
    RedirectByPort(&'static str),
    /// The same for its address, protocol and port.
    RedirectByAddress(&'static str),
}

/// A map from a protocol and a port, or from an IPv4 address and those, to another IPv4
/// address and port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Map {
    pub name: &'static str,
    pub has_address: bool,
    pub entries: Vec<Entry>,
}

/// One line of a [`Map`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// None in a map without addresses.
    pub address: Option<Ipv4Addr>,
    pub protocol: u8,
    pub port: u16,
    pub to: (Ipv4Addr, u16),
}

const IPPROTO_ICMP: u8 = 1;
pub const IPPROTO_TCP: u8 = 6;
pub const IPPROTO_UDP: u8 = 17;
const IPPROTO_ICMPV6: u8 = 58;

impl When {
    /// A ping, an error, or what IPv6 finds its neighbours with.
    pub fn control() -> [Self; 2] {
        [Self::Protocol(IPPROTO_ICMP), Self::Protocol(IPPROTO_ICMPV6)]
    }
}

// Linux include/uapi/linux/netfilter.h and nfnetlink.h.
const NFPROTO_INET: u8 = 1;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NF_INET_PRE_ROUTING: u32 = 0;
const NF_INET_LOCAL_IN: u32 = 1;
const NF_INET_FORWARD: u32 = 2;
const NF_INET_POST_ROUTING: u32 = 4;
/// NFT_NAT_DNAT.
const DNAT: u32 = 1;
/// The length of an interface's name.
const IFNAMSIZ: usize = 16;
/// NF_CT_STATE_BIT and NF_CT_STATE_INVALID_BIT (linux nf_conntrack_common.h).
const KNOWN: u32 = 1 << 1 | 1 << 2;
const INVALID: u32 = 1;
/// IPS_DST_NAT.
const TRANSLATED: u32 = 1 << 5;
/// NFT_FIB_RESULT_ADDRTYPE: the library's enumeration begins at zero, and the kernel's at one.
const ADDRTYPE: u32 = 3;
// As linux include/uapi/linux/netfilter/nf_tables.h has them.
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_LOOKUP_SET: u16 = 1;
const NFTA_LOOKUP_SREG: u16 = 2;
const NFTA_LOOKUP_DREG: u16 = 3;
/// RTN_LOCAL.
const LOCAL: u32 = 2;

impl Hook {
    /// The kind of the chain, the hook, and its priority (linux netfilter_ipv4.h).
    fn parts(self) -> (&'static std::ffi::CStr, u32, i32) {
        match self {
            Self::Raw => (c"filter", NF_INET_PRE_ROUTING, -300),
            Self::DestinationNat => (c"nat", NF_INET_PRE_ROUTING, -100),
            Self::Input => (c"filter", NF_INET_LOCAL_IN, 0),
            Self::Forward => (c"filter", NF_INET_FORWARD, 0),
            Self::SourceNat => (c"nat", NF_INET_POST_ROUTING, 100),
        }
    }
}

impl Table {
    /// Puts it into the calling thread's namespace, in the place of one of its name. One
    /// that is the same stays: to remove a table waits for every processor (RCU).
    ///
    /// # Errors
    /// No nftables in this kernel, or no privilege.
    pub fn install(&self) -> io::Result<()> {
        let mark = Sha256::digest(format!("{self:?}")).to_vec();
        let mut batch = Batch::begin();
        match batch.mark_of(&self.name) {
            Some(found) if found == mark => return Ok(()),
            Some(_) => batch.remove_table(&self.name),
            None => {}
        }
        batch.add_table(&self.name, &mark);
        for (number, map) in (1..).zip(&self.maps) {
            batch.add_map(&self.name, map, number);
        }
        for chain in &self.chains {
            batch.add_chain(&self.name, chain);
            for rule in &chain.rules {
                batch.add_rule(&self.name, chain.name, rule);
            }
        }
        batch.commit()
    }
}

/// Removes a table of the calling thread's namespace. One that is not there is no error.
///
/// # Errors
/// As [`Table::install`].
pub fn remove(name: &str) -> io::Result<()> {
    let mut batch = Batch::begin();
    if batch.mark_of(name).is_some() {
        batch.remove_table(name);
    }
    batch.commit()
}

/// A transaction.
struct Batch {
    socket: NetlinkSocket,
    messages: Chained<'static>,
}

/// More than any table of ours has messages.
const SEQUENCE: u32 = 4096;

impl Batch {
    fn begin() -> Self {
        let mut socket = NetlinkSocket::new();
        let mut messages = Chained::new(socket.reserve_seq(SEQUENCE));
        drop(messages.request().op_batch_begin_do(&end()));
        Self { socket, messages }
    }

    /// By what a table that is there was marked when it was made.
    fn mark_of(&mut self, name: &str) -> Option<Vec<u8>> {
        let mut request = Request::new().op_gettable_do(&header());
        drop(request.encode().push_name_bytes(name.as_bytes()));
        let mut reply = self.socket.request(&request).ok()?;
        let (_, table) = reply.recv_one().ok()?;
        Some(table.get_userdata().unwrap_or_default().to_vec())
    }

    fn add_table(&mut self, name: &str, mark: &[u8]) {
        let request = self.messages.request().set_create();
        let mut request = request.op_newtable_do(&header());
        let table = request.encode().push_name_bytes(name.as_bytes());
        drop(table.push_userdata(mark));
    }

    fn remove_table(&mut self, name: &str) {
        let mut request = self.messages.request().op_deltable_do(&header());
        drop(request.encode().push_name_bytes(name.as_bytes()));
    }

    fn add_chain(&mut self, table: &str, chain: &Chain) {
        let (kind, hook, priority) = chain.hook.parts();
        let request = self.messages.request().set_create();
        let mut request = request.op_newchain_do(&header());
        let encoder = request.encode();
        let encoder = encoder.push_table_bytes(table.as_bytes());
        let encoder = encoder.push_name_bytes(chain.name.as_bytes());
        let place = encoder.nested_hook().push_num(hook).push_priority(priority);
        let encoder = place.end_nested().push_type(kind);
        drop(encoder.push_policy(VerdictCode::Accept as u32));
    }

    fn add_map(&mut self, table: &str, map: &Map, number: u32) {
        let request = self.messages.request().set_create();
        let mut request = request.op_newset_do(&header());
        let encoder = request.encode().push_table_bytes(table.as_bytes());
        let encoder = encoder.push_name_bytes(map.name.as_bytes());
        let encoder = encoder.push_flags(SetFlags::Map as u32);
        let encoder = encoder
            .push_key_type(map.key_type())
            .push_key_len(map.key_length());
        let encoder = encoder
            .push_data_type(joined([TYPE_ADDRESS, TYPE_PORT]))
            .push_data_len(8);
        drop(encoder.push_id(number));
        // An attribute is 64 KiB at most, and an entry some fifty bytes.
        for entries in map.entries.chunks(500) {
            let request = self.messages.request().set_create();
            let mut request = request.op_newsetelem_do(&header());
            let encoder = request.encode().push_table_bytes(table.as_bytes());
            let encoder = encoder.push_set_bytes(map.name.as_bytes());
            let mut list = encoder.push_set_id(number).nested_elements();
            for entry in entries {
                let element = list.nested_elem();
                let element = element.nested_key().push_value(&entry.key()).end_nested();
                let element = element.nested_data().push_value(&entry.data()).end_nested();
                list = element.end_nested();
            }
        }
    }

    fn add_rule(&mut self, table: &str, chain: &str, rule: &Rule) {
        let request = self.messages.request().set_create().set_append();
        let encoder = request.op_newrule_do(&header()).into_encoder();
        let encoder = encoder.push_table_bytes(table.as_bytes());
        let encoder = encoder.push_chain_bytes(chain.as_bytes());
        let mut expressions = Expressions(encoder.nested_expressions());
        for when in &rule.when {
            expressions = expressions.when(when);
        }
        expressions.then(&rule.then);
    }

    fn commit(mut self) -> io::Result<()> {
        drop(self.messages.request().op_batch_end_do(&end()));
        let messages = self.messages.finalize();
        let mut replies = self.socket.request_chained(&messages)?;
        replies.recv_all().map_err(described)
    }
}

// What nft(8) shows the parts as (its include/datatype.h); to the kernel they are bytes.
const TYPE_ADDRESS: u32 = 7;
const TYPE_PROTOCOL: u32 = 12;
const TYPE_PORT: u32 = 13;

/// The type of parts one after another.
fn joined<const N: usize>(parts: [u32; N]) -> u32 {
    parts.into_iter().fold(0, |all, part| all << 6 | part)
}

impl Map {
    fn key_type(&self) -> u32 {
        match self.has_address {
            true => joined([TYPE_ADDRESS, TYPE_PROTOCOL, TYPE_PORT]),
            false => joined([TYPE_PROTOCOL, TYPE_PORT]),
        }
    }

    /// In bytes: each part has a register of four.
    fn key_length(&self) -> u32 {
        if self.has_address { 12 } else { 8 }
    }
}

impl Entry {
    fn key(&self) -> Vec<u8> {
        let mut key = Vec::new();
        if let Some(address) = self.address {
            key.extend(address.octets());
        }
        key.extend([self.protocol, 0, 0, 0]);
        key.extend(padded(self.port));
        key
    }

    fn data(&self) -> Vec<u8> {
        let (address, port) = self.to;
        [address.octets(), padded(port)].concat()
    }
}

/// A port, in a register.
fn padded(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}

fn header() -> Nfgenmsg {
    Nfgenmsg {
        nfgen_family: NFPROTO_INET,
        ..Nfgenmsg::new()
    }
}

/// The first and the last message's.
fn end() -> Nfgenmsg {
    let mut header = Nfgenmsg::new();
    header.set_res_id(NFNL_SUBSYS_NFTABLES);
    header
}

type List<'a> = PushExprListAttrs<PushRuleAttrs<RequestBuf<'a>>>;

/// What a rule is for the kernel: steps on registers, each of which lets a packet go on or
/// not (linux net/netfilter/nf_tables_core.c).
struct Expressions<'a>(List<'a>);

/// The first of four bytes each.
const R0: u32 = Registers::Reg3200 as u32;
const R1: u32 = Registers::Reg3201 as u32;
const R2: u32 = Registers::Reg3202 as u32;

impl Expressions<'_> {
    fn when(self, when: &When) -> Self {
        match when {
            When::From(name) => self.interface(MetaKeys::Iifname, CmpOps::Eq, name),
            When::NotFrom(name) => self.interface(MetaKeys::Iifname, CmpOps::Neq, name),
            When::To(name) => self.interface(MetaKeys::Oifname, CmpOps::Eq, name),
            When::NotTo(name) => self.interface(MetaKeys::Oifname, CmpOps::Neq, name),
            When::Ipv4 => self.family(NFPROTO_IPV4),
            When::Ipv6 => self.family(NFPROTO_IPV6),
            When::Protocol(number) => self
                .meta(MetaKeys::L4Proto, R0)
                .compare(CmpOps::Eq, &[*number]),
            When::Source(net) => self.address(net, 12, 8),
            When::Destination(net) => self.address(net, 16, 24),
            When::ToUs => self.fib().compare(CmpOps::Eq, &LOCAL.to_ne_bytes()),
            When::Ports(ports) => self.port(R0).between(ports),
            When::Known => self.connection(CtKeys::State).has(KNOWN),
            When::Invalid => self.connection(CtKeys::State).has(INVALID),
            When::Translated => self.connection(CtKeys::Status).has(TRANSLATED),
        }
    }

    fn then(self, then: &Then) -> Self {
        match then {
            Then::Accept => self.verdict(VerdictCode::Accept),
            Then::Drop => self.verdict(VerdictCode::Drop),
            Then::Reject => self.reject(),
            // It has no attributes that we want, and the library no name for it.
            Then::Masquerade => Self(self.0.nested_elem().push_name(c"masq").end_nested()),
            Then::Redirect(IpAddr::V4(to)) => {
                self.immediate(&to.octets()).redirect(NFPROTO_IPV4, None)
            }
            Then::Redirect(IpAddr::V6(to)) => {
                self.immediate(&to.octets()).redirect(NFPROTO_IPV6, None)
            }
            Then::RedirectByPort(map) => self
                .meta(MetaKeys::L4Proto, R0)
                .port(R1)
                .lookup(map)
                .redirect(NFPROTO_IPV4, Some(R1)),
            Then::RedirectByAddress(map) => self
                .payload(PayloadBase::NetworkHeader, 16, 4, R0)
                .meta(MetaKeys::L4Proto, R1)
                .port(R2)
                .lookup(map)
                .redirect(NFPROTO_IPV4, Some(R1)),
        }
    }

    fn interface(self, key: MetaKeys, op: CmpOps, interface: &Interface) -> Self {
        let mut name = [0; IFNAMSIZ];
        let wanted = match interface {
            Interface::Named(text) => {
                let length = text.len().min(IFNAMSIZ - 1);
                name[..length].copy_from_slice(&text.as_bytes()[..length]);
                &name[..]
            }
            // What is not compared may be anything.
            Interface::Prefix(text) => text.as_bytes(),
        };
        self.meta(key, R0).compare(op, wanted)
    }

    fn family(self, number: u8) -> Self {
        self.meta(MetaKeys::Nfproto, R0)
            .compare(CmpOps::Eq, &[number])
    }

    /// An address at one of two offsets, those of IPv4's header and of IPv6's.
    fn address(self, net: &IpNet, in_v4: u32, in_v6: u32) -> Self {
        let (family, offset, bytes, mask) = match net.trunc() {
            IpNet::V4(net) => (
                NFPROTO_IPV4,
                in_v4,
                net.addr().octets().to_vec(),
                net.netmask().octets().to_vec(),
            ),
            IpNet::V6(net) => (
                NFPROTO_IPV6,
                in_v6,
                net.addr().octets().to_vec(),
                net.netmask().octets().to_vec(),
            ),
        };
        let length = bytes.len() as u32;
        self.family(family)
            .payload(PayloadBase::NetworkHeader, offset, length, R0)
            .mask(&mask)
            .compare(CmpOps::Eq, &bytes)
    }

    fn port(self, register: u32) -> Self {
        self.payload(PayloadBase::TransportHeader, 2, 2, register)
    }

    fn meta(self, key: MetaKeys, register: u32) -> Self {
        let meta = self.0.nested_elem().nested_data_meta();
        let meta = meta.push_key(key as u32).push_dreg(register);
        Self(meta.end_nested().end_nested())
    }

    fn payload(self, base: PayloadBase, offset: u32, length: u32, register: u32) -> Self {
        let payload = self.0.nested_elem().nested_data_payload();
        let payload = payload.push_base(base as u32).push_offset(offset);
        let payload = payload.push_len(length).push_dreg(register);
        Self(payload.end_nested().end_nested())
    }

    fn fib(self) -> Self {
        let fib = self.0.nested_elem().nested_data_fib().push_dreg(R0);
        let fib = fib.push_result(ADDRTYPE);
        let fib = fib.push_flags(FibFlags::Daddr as u32);
        Self(fib.end_nested().end_nested())
    }

    fn connection(self, key: CtKeys) -> Self {
        let connection = self.0.nested_elem().nested_data_ct();
        let connection = connection.push_key(key as u32).push_dreg(R0);
        Self(connection.end_nested().end_nested())
    }

    fn mask(self, mask: &[u8]) -> Self {
        let bits = self.0.nested_elem().nested_data_bitwise();
        let bits = bits.push_sreg(R0).push_dreg(R0).push_len(mask.len() as u32);
        let bits = bits.nested_mask().push_value(mask).end_nested();
        let bits = bits.nested_xor().push_value(&vec![0; mask.len()]);
        Self(bits.end_nested().end_nested().end_nested())
    }

    /// Whether one of these bits is set.
    fn has(self, bits: u32) -> Self {
        self.mask(&bits.to_ne_bytes())
            .compare(CmpOps::Neq, &0_u32.to_ne_bytes())
    }

    fn compare(self, op: CmpOps, value: &[u8]) -> Self {
        let compare = self.0.nested_elem().nested_data_cmp();
        let compare = compare.push_sreg(R0).push_op(op as u32);
        let compare = compare.nested_data().push_value(value).end_nested();
        Self(compare.end_nested().end_nested())
    }

    fn between(self, ports: &RangeInclusive<u16>) -> Self {
        self.compare(CmpOps::Gte, &ports.start().to_be_bytes())
            .compare(CmpOps::Lte, &ports.end().to_be_bytes())
    }

    fn lookup(self, map: &str) -> Self {
        // The library (0.3.5) numbers these attributes as the kernel does not
        // (`enum nft_lookup_attributes`).
        let mut lookup = self.0.nested_elem().push_name(c"lookup");
        let buffer = lookup.as_vec_mut();
        let data = push_nested_header(buffer, NFTA_EXPR_DATA);
        let name = [map.as_bytes(), &[0]].concat();
        for (attribute, value) in [
            (NFTA_LOOKUP_SET, &name[..]),
            (NFTA_LOOKUP_SREG, &R0.to_be_bytes()),
            (NFTA_LOOKUP_DREG, &R0.to_be_bytes()),
        ] {
            push_header(buffer, attribute, value.len() as u16);
            buffer.extend_from_slice(value);
        }
        finalize_nested_header(buffer, data);
        Self(lookup.end_nested())
    }

    fn immediate(self, value: &[u8]) -> Self {
        let immediate = self.0.nested_elem().nested_data_immediate();
        let immediate = immediate.push_dreg(R0).nested_data().push_value(value);
        Self(immediate.end_nested().end_nested().end_nested())
    }

    /// To the address in the first registers.
    fn redirect(self, family: u8, port: Option<u32>) -> Self {
        let nat = self.0.nested_elem().nested_data_nat();
        let nat = nat.push_type(DNAT).push_family(family.into());
        let mut nat = nat.push_reg_addr_min(R0);
        if let Some(register) = port {
            nat = nat.push_reg_proto_min(register);
        }
        Self(nat.end_nested().end_nested())
    }

    fn reject(self) -> Self {
        let reject = self.0.nested_elem().nested_data_reject();
        let reject = reject.push_type(RejectTypes::IcmpxUnreach as u32);
        let reject = reject.push_icmp_code(RejectInetCode::IcmpxAdminProhibited as u8);
        Self(reject.end_nested().end_nested())
    }

    fn verdict(self, code: VerdictCode) -> Self {
        let verdict = self.0.nested_elem().nested_data_immediate();
        let verdict = verdict.push_dreg(Registers::RegVerdict as u32);
        let verdict = verdict.nested_data().nested_verdict();
        // Those that only the kernel knows are negative.
        let verdict = verdict.push_code(code as u32).end_nested();
        Self(verdict.end_nested().end_nested().end_nested())
    }
}
