use super::*;
use domain::base::iana::OptionCode;
use domain::base::opt::UnknownOptData;
use domain::base::{Message, MessageBuilder};
use domain::rdata::AllRecordData;

struct Network;

impl Names for Network {
    fn addresses(&self, name: &str) -> Option<Vec<IpAddr>> {
        let addresses: &[&str] = match name {
            "web" => &["10.0.0.2", "fd00::2"],
            "four" => &["10.0.0.4"],
            "many" => {
                return Some(
                    (0..200)
                        .map(|n| Ipv4Addr::new(10, 1, 0, n).into())
                        .collect(),
                );
            }
            _ => return None,
        };
        Some(addresses.iter().map(|it| it.parse().unwrap()).collect())
    }

    fn name_of(&self, address: IpAddr) -> Option<String> {
        let ours = ["10.0.0.2", "fd00::2"].map(|it| it.parse::<IpAddr>().unwrap());
        ours.contains(&address).then(|| "web.net".into())
    }
}

fn question(name: &str, kind: Rtype, edns: Option<(u16, u8)>) -> Vec<u8> {
    let mut builder = MessageBuilder::new_vec();
    builder.header_mut().set_id(0x1234);
    builder.header_mut().set_rd(true);
    let mut question = builder.question();
    question
        .push((name.parse::<Name<Vec<u8>>>().unwrap(), kind))
        .unwrap();
    let mut additional = question.additional();
    if let Some((size, version)) = edns {
        additional
            .opt(|opt| {
                opt.set_udp_payload_size(size);
                opt.set_version(version);
                Ok(())
            })
            .unwrap();
    }
    additional.finish()
}

fn answered(bytes: &[u8], transport: Transport) -> Message<Vec<u8>> {
    match judge(bytes, transport, &Network) {
        Verdict::Answer(answer) => Message::from_octets(answer).unwrap(),
        other => panic!("{other:?}"),
    }
}

/// The records of an answer as text.
fn data(answer: &Message<Vec<u8>>) -> Vec<String> {
    let records = answer
        .answer()
        .unwrap()
        .limit_to::<AllRecordData<_, ParsedName<_>>>();
    records.map(|it| it.unwrap().data().to_string()).collect()
}

#[test]
fn a_name_of_ours_has_the_addresses_of_the_family_that_is_asked_for() {
    for (name, kind, expected) in [
        ("web", Rtype::A, &["10.0.0.2"][..]),
        ("WeB", Rtype::A, &["10.0.0.2"]),
        ("web", Rtype::AAAA, &["fd00::2"]),
        ("four", Rtype::AAAA, &[]),
        ("four", Rtype::MX, &[]),
        ("four", Rtype::PTR, &[]),
        ("four", Rtype::ANY, &["10.0.0.4"]),
    ] {
        let asked = question(name, kind, None);
        let answer = answered(&asked, Transport::Udp);
        assert_eq!(data(&answer), expected, "{name} {kind}");
        let header = answer.header();
        assert_eq!(header.rcode(), Rcode::NOERROR);
        assert_eq!(header.id(), 0x1234);
        assert!(header.qr() && header.aa() && header.ra() && header.rd() && !header.tc());
        assert!(fits(&asked, answer.as_slice()));
        assert!(answer.opt().is_none());
    }
}

#[test]
fn an_answer_does_not_hold_for_long() {
    let answer = answered(&question("web", Rtype::A, None), Transport::Udp);
    let record = answer.answer().unwrap().next().unwrap().unwrap();
    assert!(record.ttl().as_secs() <= 10);
}

#[test]
fn an_address_of_ours_has_a_name() {
    let six = format!("2.{}0.0.d.f.ip6.arpa", "0.".repeat(27));
    for name in ["2.0.0.10.in-addr.arpa", &six] {
        let answer = answered(&question(name, Rtype::PTR, None), Transport::Udp);
        assert_eq!(data(&answer), ["web.net."], "{name}");
    }
    for name in [
        "3.0.0.10.in-addr.arpa",
        "0.0.10.in-addr.arpa",
        "1.2.0.0.10.in-addr.arpa",
        "2.0.0.256.in-addr.arpa",
        "x.0.0.10.in-addr.arpa",
        "in-addr.arpa",
        "0.0.d.f.ip6.arpa",
        &format!("0.{six}"),
        &six.replacen("2.", "22.", 1),
    ] {
        let verdict = judge(&question(name, Rtype::PTR, None), Transport::Udp, &Network);
        assert_eq!(verdict, Verdict::Forward, "{name}");
    }
}

#[test]
fn what_is_not_about_us_is_asked_elsewhere() {
    for (name, kind) in [
        ("example.com", Rtype::A),
        ("web.example.com", Rtype::AAAA),
        ("2.0.0.10.in-addr.arpa", Rtype::A),
        (".", Rtype::NS),
        // One label with a dot in it.
        (r"we\.b", Rtype::A),
    ] {
        let verdict = judge(&question(name, kind, None), Transport::Udp, &Network);
        assert_eq!(verdict, Verdict::Forward, "{name}");
    }
}

#[test]
fn an_answer_that_is_too_long_says_so() {
    let whole = answered(&question("many", Rtype::A, None), Transport::Tcp);
    assert_eq!(data(&whole).len(), 200);
    assert!(!whole.header().tc());
    for edns in [None, Some((4096, 0)), Some((1, 0))] {
        let asked = question("many", Rtype::A, edns);
        let cut = answered(&asked, Transport::Udp);
        assert!(cut.header().tc());
        assert_eq!(data(&cut).len(), 0);
        assert!(fits(&asked, cut.as_slice()));
        assert_eq!(cut.opt().is_some(), edns.is_some());
    }
}

#[test]
fn the_first_of_many_addresses_changes() {
    let first = |id| {
        let mut asked = question("many", Rtype::A, None);
        set_id(&mut asked, id);
        data(&answered(&asked, Transport::Tcp)).remove(0)
    };
    assert_ne!(first(3), first(4));
}

#[test]
fn who_speaks_edns_is_answered_in_it() {
    let answer = answered(&question("web", Rtype::A, Some((1232, 0))), Transport::Udp);
    let opt = answer.opt().unwrap();
    assert_eq!(opt.udp_payload_size(), 1232);
    assert_eq!(answer.opt_rcode(), OptRcode::NOERROR);
    let answer = answered(&question("web", Rtype::A, Some((1232, 1))), Transport::Udp);
    assert_eq!(answer.opt_rcode(), OptRcode::BADVERS);
    // An option is nothing to us.
    let mut builder = MessageBuilder::new_vec().question();
    let name: Name<Vec<u8>> = "web".parse().unwrap();
    builder.push((name, Rtype::A)).unwrap();
    let mut additional = builder.additional();
    let cookie = UnknownOptData::new(OptionCode::COOKIE, [7; 8]).unwrap();
    additional.opt(|opt| opt.push(&cookie)).unwrap();
    let answer = answered(&additional.finish(), Transport::Udp);
    assert_eq!(data(&answer), ["10.0.0.2"]);
}

#[test]
fn what_is_no_question_is_no_question() {
    let whole = question("web", Rtype::A, None);
    for bytes in [&whole[..0], &whole[..HEADER - 1]] {
        assert_eq!(judge(bytes, Transport::Udp, &Network), Verdict::Drop);
    }
    let mut is_answer = whole.clone();
    is_answer[2] |= 0x80;
    assert_eq!(judge(&is_answer, Transport::Udp, &Network), Verdict::Drop);
    let mut is_update = whole.clone();
    is_update[2] |= 5 << 3;
    let answer = answered(&is_update, Transport::Udp);
    assert_eq!(answer.header().rcode(), Rcode::NOTIMP);
    // No question, and two, and one that ends early, and one that points to itself.
    let cut = whole[..whole.len() - 1].to_vec();
    let count = |n| {
        let mut bytes = whole.clone();
        bytes[5] = n;
        bytes
    };
    let mut looped = whole[..HEADER].to_vec();
    looped.extend([0xc0, HEADER as u8, 0, 1, 0, 1]);
    let mut many = looped.clone();
    many.splice(HEADER.., whole[HEADER..].repeat(600));
    many[4..6].copy_from_slice(&600_u16.to_be_bytes());
    for bytes in [count(0), count(2), cut, looped, many] {
        let answer = answered(&bytes, Transport::Udp);
        assert_eq!(answer.header().rcode(), Rcode::FORMERR);
        assert_eq!(answer.header().id(), 0x1234);
        assert!(answer.as_slice().len() <= usize::from(UDP_MAX));
    }
}

#[test]
fn only_what_answers_a_question_is_an_answer() {
    let asked = question("example.com", Rtype::A, None);
    let good = refuse(&asked, Rcode::NXDOMAIN).unwrap();
    assert!(fits(&asked, &good));
    assert!(!is_failure(&good));
    let mut changed = good.clone();
    changed[0] ^= 1;
    assert!(!fits(&asked, &changed), "another number");
    assert!(!fits(&asked, &asked), "no answer");
    for other in [
        question("example.com", Rtype::AAAA, None),
        question("example.org", Rtype::A, None),
    ] {
        assert!(!fits(&asked, &refuse(&other, Rcode::NOERROR).unwrap()));
    }
    // A server that has not understood says no more.
    let mut bare = good[..HEADER].to_vec();
    bare[4..HEADER].fill(0);
    assert!(!fits(&asked, &bare), "it knows the name, it says");
    bare[3] = bare[3] & 0xf0 | 1;
    assert!(fits(&asked, &bare));
    assert!(is_failure(&bare));
    assert!(!fits(&asked, &good[..HEADER]), "no question");
}
