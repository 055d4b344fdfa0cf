use super::*;

fn servers(text: &str) -> Vec<String> {
    let upstream = Upstream::from_resolv_conf(text);
    upstream.servers.iter().map(ToString::to_string).collect()
}

#[test]
fn servers_are_found_as_resolvers_find_them() {
    let text = "# nameserver 1.1.1.1\n; nameserver 1.1.1.2\nsearch example.com\n\
        nameserver 10.0.0.1 # ours\n\tnameserver\t2001:db8::1\nnameserver 10.0.0\n\
        nameserver\nnameserver fe80::1%3\nnameservers 1.2.3.4\nnameserver 10.0.0.4\n";
    assert_eq!(
        servers(text),
        ["10.0.0.1:53", "[2001:db8::1]:53", "[fe80::1%3]:53"]
    );
}

#[test]
fn an_interface_may_have_a_name() {
    assert_eq!(servers("nameserver fe80::1%lo"), ["[fe80::1%1]:53"]);
    let text = "nameserver fe80::1%no-such-interface\nnameserver 10.0.0.1%lo\nnameserver ::2";
    assert_eq!(servers(text), ["[::2]:53"]);
}

#[test]
fn without_any_the_host_is_asked() {
    for text in ["", "search example.com", "nameserver nonsense"] {
        assert_eq!(servers(text), ["127.0.0.1:53"]);
    }
}

#[test]
fn times_are_heeded_within_bounds() {
    let times = |text| {
        let upstream = Upstream::from_resolv_conf(text);
        (upstream.timeout.as_secs(), upstream.attempts)
    };
    assert_eq!(times(""), (5, 2));
    assert_eq!(
        times("options ndots:5 timeout:2\noptions attempts:3"),
        (2, 3)
    );
    assert_eq!(times("options timeout:0 attempts:0"), (1, 1));
    assert_eq!(times("options timeout:9999 attempts:99"), (30, 5));
    assert_eq!(times("options timeout:x attempts:-1 timeout"), (5, 2));
}
