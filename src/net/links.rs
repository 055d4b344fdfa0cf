//! Interfaces, addresses and routes of the calling thread's namespace, by rtnetlink(7).

use super::namespace::has_ipv6;
use ipnet::IpNet;
use netlink_bindings::rt_addr::{self, Ifaddrmsg};
use netlink_bindings::rt_link::{self, Ifinfomsg, PushLinkAttrs};
use netlink_bindings::rt_neigh::{self, Ndmsg};
use netlink_bindings::rt_route::{self, Rtmsg};
use netlink_bindings::traits::{NetlinkRequest, Pusher};
use netlink_bindings::utils::{finalize_nested_header, push_nested_header};
use netlink_socket2::{NetlinkSocket, ReplyError};
use rustix::fd::{AsRawFd, BorrowedFd};
use std::io;
use std::net::IpAddr;

/// An Ethernet address.
pub type Mac = [u8; 6];

// Linux include/uapi/linux/if.h, if_addr.h, neighbour.h, rtnetlink.h and if_link.h.
const IFF_UP: u32 = 1;
const IFA_F_NODAD: u8 = 2;
const NUD_PERMANENT: u16 = 0x80;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RTN_UNICAST: u8 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// The pair by which a namespace is connected to a bridge.
pub struct Pair<'a> {
    /// The end at the bridge.
    pub name: &'a str,
    /// The bridge's number.
    pub bridge: u32,
    /// Where the other end is.
    pub namespace: BorrowedFd<'a>,
    /// How it is called there.
    pub peer: &'a str,
    /// Its Ethernet address.
    pub mac: Mac,
}

/// A connection to the kernel.
pub struct Links(NetlinkSocket);

impl Links {
    /// To the calling thread's namespace.
    pub fn new() -> Self {
        Self(NetlinkSocket::new())
    }

    /// The number of an interface.
    ///
    /// # Errors
    /// None of that name.
    pub fn index(&mut self, name: &str) -> io::Result<u32> {
        let mut request = rt_link::Request::new().op_getlink_do(&Ifinfomsg::new());
        request.encode().push_ifname_bytes(name.as_bytes());
        let mut reply = self.0.request(&request)?;
        let (header, _) = reply.recv_one()?;
        u32::try_from(header.ifi_index).map_err(io::Error::other)
    }

    /// Makes a bridge that learns and forwards at once; its number.
    ///
    /// # Errors
    /// No bridges in this kernel, or no privilege; one that is there is an error too.
    pub fn add_bridge(&mut self, name: &str) -> io::Result<u32> {
        let request = rt_link::Request::new().set_create().set_excl();
        let mut request = request.op_newlink_do(&Ifinfomsg::new());
        let link = request.encode().push_ifname_bytes(name.as_bytes());
        let bridge = link.nested_linkinfo().nested_data_bridge();
        drop(bridge.push_forward_delay(0).push_stp_state(0).end_nested());
        self.send(&request)?;
        self.index(name)
    }

    /// Makes a pair.
    ///
    /// # Errors
    /// A bridge that has no port left (1024 of linux net/bridge/br_private.h), or no
    /// privilege.
    pub fn add_pair(&mut self, pair: &Pair<'_>) -> io::Result<()> {
        let up = Ifinfomsg {
            ifi_flags: IFF_UP,
            ifi_change: IFF_UP,
            ..Ifinfomsg::new()
        };
        let request = rt_link::Request::new().set_create().set_excl();
        let mut request = request.op_newlink_do(&up);
        let link = request.encode();
        let link = link.push_ifname_bytes(pair.name.as_bytes());
        let mut info = link.push_master(pair.bridge).nested_linkinfo();
        info = info.push_kind(c"veth");
        // `struct ifinfomsg` and attributes, nested twice (linux drivers/net/veth.c).
        let buffer = info.as_vec_mut();
        let data = push_nested_header(buffer, IFLA_INFO_DATA);
        let peer = push_nested_header(buffer, VETH_INFO_PEER);
        // Not up yet: the two know each other only when both are made.
        buffer.extend_from_slice(Ifinfomsg::new().as_slice());
        let namespace = pair.namespace.as_raw_fd().unsigned_abs();
        drop(
            PushLinkAttrs::new(&mut *buffer)
                .push_ifname_bytes(pair.peer.as_bytes())
                .push_address(&pair.mac)
                .push_net_ns_fd(namespace),
        );
        finalize_nested_header(buffer, peer);
        finalize_nested_header(buffer, data);
        drop(info.end_nested());
        self.send(&request)
    }

    /// Brings an interface up, under another Ethernet address if one is given.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_up(&mut self, index: u32, mac: Option<Mac>) -> io::Result<()> {
        let header = Ifinfomsg {
            ifi_index: signed(index)?,
            ifi_flags: IFF_UP,
            ifi_change: IFF_UP,
            ..Ifinfomsg::new()
        };
        let mut request = rt_link::Request::new().op_setlink_do(&header);
        if let Some(mac) = mac {
            drop(request.encode().push_address(&mac));
        }
        self.send(&request)
    }

    /// Removes an interface. One that is not there is no error.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove(&mut self, name: &str) -> io::Result<()> {
        let mut request = rt_link::Request::new().op_dellink_do(&Ifinfomsg::new());
        drop(request.encode().push_ifname_bytes(name.as_bytes()));
        match self.0.request(&request)?.recv_ack() {
            Err(error) if error.as_io_error().raw_os_error() == Some(libc::ENODEV) => Ok(()),
            done => done.map_err(described),
        }
    }

    /// Gives an interface an address, that of the net.
    ///
    /// # Errors
    /// What the kernel says; one that it has already is no error.
    pub fn add_address(&mut self, index: u32, net: IpNet) -> io::Result<()> {
        let header = Ifaddrmsg {
            ifa_family: family(net.addr()),
            ifa_prefixlen: net.prefix_len(),
            // Nobody else can have it: there is nothing to ask, and to wait for.
            ifa_flags: IFA_F_NODAD,
            ifa_index: index,
            ..Ifaddrmsg::new()
        };
        let request = rt_addr::Request::new().set_create().set_replace();
        let mut request = request.op_newaddr_do(&header);
        let addresses = request.encode().push_local(net.addr());
        let addresses = addresses.push_address(net.addr());
        drop(match net {
            IpNet::V4(net) => addresses.push_broadcast(net.broadcast()),
            IpNet::V6(_) => addresses,
        });
        self.send(&request)
    }

    /// Writes down who has an address, so that nobody is asked, and nobody else believed.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn add_neighbour(&mut self, index: u32, address: IpAddr, mac: Mac) -> io::Result<()> {
        let header = Ndmsg {
            ndm_family: family(address),
            ndm_ifindex: signed(index)?,
            ndm_state: NUD_PERMANENT,
            ..Ndmsg::new()
        };
        let request = rt_neigh::Request::new().set_create().set_replace();
        let mut request = request.op_newneigh_do(&header);
        drop(request.encode().push_dst(address).push_lladdr(&mac));
        self.send(&request)
    }

    /// Sends whatever has no better way to `gateway`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn add_default_route(&mut self, gateway: IpAddr) -> io::Result<()> {
        let header = Rtmsg {
            rtm_family: family(gateway),
            rtm_table: RT_TABLE_MAIN,
            rtm_protocol: RTPROT_STATIC,
            rtm_type: RTN_UNICAST,
            ..Rtmsg::new()
        };
        let request = rt_route::Request::new().set_create().set_replace();
        let mut request = request.op_newroute_do(&header);
        drop(request.encode().push_gateway(gateway));
        self.send(&request)
    }

    /// All that the host has a way to, but the default route.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn destinations(&mut self) -> io::Result<Vec<IpNet>> {
        let mut found = Vec::new();
        let families = [AF_INET, AF_INET6];
        for rtm_family in families.into_iter().take(1 + usize::from(has_ipv6())) {
            let header = Rtmsg {
                rtm_family,
                ..Rtmsg::new()
            };
            let request = rt_route::Request::new().op_getroute_dump(&header);
            let mut routes = self.0.request(&request)?;
            while let Some(route) = routes.recv().transpose()? {
                let (header, attributes) = route;
                if let Ok(address) = attributes.get_dst()
                    && let Ok(net) = IpNet::new(address, header.rtm_dst_len)
                {
                    found.push(net);
                }
            }
        }
        Ok(found)
    }

    fn send(&mut self, request: &impl NetlinkRequest) -> io::Result<()> {
        self.0.request(request)?.recv_ack().map_err(described)
    }
}

/// An error with what the kernel says of it.
pub fn described(error: ReplyError) -> io::Error {
    io::Error::new(error.as_io_error().kind(), error.to_string())
}

fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => AF_INET,
        IpAddr::V6(_) => AF_INET6,
    }
}

fn signed(index: u32) -> io::Result<i32> {
    i32::try_from(index).map_err(io::Error::other)
}
