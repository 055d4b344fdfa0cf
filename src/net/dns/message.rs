//! Questions and answers, as bytes (RFC 1035 §4, RFC 6891).
//!
//! The format is read and written by `domain`, NLnet Labs' library: it reads no more of a
//! message than it is asked for, follows compressed names within bounds, and takes
//! nothing apart that is only passed on. What a guest or a server has sent is never
//! trusted: all in here is a function of bytes, which cannot fail but by saying so.

use domain::base::iana::{Class, Opcode, OptRcode, Rcode, Rtype};
use domain::base::message_builder::{AdditionalBuilder, AnswerBuilder, PushError, QuestionBuilder};
use domain::base::name::ParsedName;
use domain::base::{Message, MessageBuilder, Name, Question, Ttl};
use domain::rdata::{A, Aaaa, Ptr};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The shortest message: a header, in bytes.
#[cfg(any(test, fuzzing))]
pub const HEADER: usize = 12;
/// The longest question that is taken, in bytes. One has a name of at most 255, and what
/// EDNS adds: a cookie, padding.
pub const QUESTION_MAX: usize = 4096;
/// The longest answer by UDP to who says nothing of it, in bytes (RFC 1035 §4.2.1).
const UDP_MAX: u16 = 512;
/// The longest message that we say to take by UDP, in bytes, and that we send: it fits
/// into one packet of any network (RFC 9715).
const EDNS_UDP_MAX: u16 = 1232;

/// How long an answer of ours holds, in seconds. A fork, or a container that comes or
/// goes, changes what a name means: it is to be noticed soon.
const TTL: Ttl = Ttl::from_secs(5);

/// What names mean to one container.
pub trait Names: Send + Sync {
    /// The addresses of `name`, in lower case and without a final dot, on the container's
    /// networks: `None` if it is no name of ours.
    fn addresses(&self, name: &str) -> Option<Vec<IpAddr>>;

    /// Who has an address of the container's networks: `None` if it is none of ours.
    fn name_of(&self, address: IpAddr) -> Option<String>;
}

/// By what a question has come, and the answer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Udp,
    Tcp,
}

/// What is to be done about a message of the guest.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing: it is no question.
    Drop,
    /// This is the answer.
    Answer(Vec<u8>),
    /// It is a question, and not about us.
    Forward,
}

/// Looks at a message of the guest.
pub fn judge(bytes: &[u8], transport: Transport, names: &dyn Names) -> Verdict {
    let Ok(message) = Message::from_slice(bytes) else {
        return Verdict::Drop;
    };
    if message.header().qr() {
        return Verdict::Drop;
    }
    if message.header().opcode() != Opcode::QUERY {
        return refuse(bytes, Rcode::NOTIMP).map_or(Verdict::Drop, Verdict::Answer);
    }
    let Ok(question) = message.sole_question() else {
        return refuse(bytes, Rcode::FORMERR).map_or(Verdict::Drop, Verdict::Answer);
    };
    match records(&question, names, message.header().id()) {
        Some(records) => {
            let limit = limit(message, transport);
            answer(message, &records, limit).map_or(Verdict::Drop, Verdict::Answer)
        }
        None => Verdict::Forward,
    }
}

/// The answer to `question` that says no more than `code`; `None` if it is no message.
pub fn refuse(question: &[u8], code: Rcode) -> Option<Vec<u8>> {
    let message = Message::from_slice(question).ok()?;
    let mut answer = begin(message, code, usize::from(UDP_MAX)).ok()?.answer();
    answer.header_mut().set_ra(true);
    let mut additional = answer.additional();
    push_opt(message, &mut additional).ok()?;
    Some(additional.finish())
}

/// The header of an answer, and the question. Several questions, which would make no
/// sense, are not repeated: they may be long.
fn begin(
    question: &Message<[u8]>,
    code: Rcode,
    limit: usize,
) -> Result<QuestionBuilder<Vec<u8>>, PushError> {
    let mut builder = MessageBuilder::new_vec();
    builder.set_push_limit(limit);
    let header = builder.header_mut();
    let asked = question.header();
    header.set_id(asked.id());
    header.set_qr(true);
    header.set_opcode(asked.opcode());
    header.set_rd(asked.rd());
    header.set_rcode(code);
    let mut builder = builder.question();
    if let Ok(question) = question.sole_question() {
        builder.push(question)?;
    }
    Ok(builder)
}

/// Whether `answer` is one to `question`, which has the same number.
pub fn fits(question: &[u8], answer: &[u8]) -> bool {
    let (Ok(question), Ok(answer)) = (Message::from_slice(question), Message::from_slice(answer))
    else {
        return false;
    };
    let (asked, answered) = (question.header(), answer.header());
    if !answered.qr() || answered.id() != asked.id() || answered.opcode() != asked.opcode() {
        return false;
    }
    match (question.sole_question(), answer.sole_question()) {
        (Ok(asked), Ok(answered)) => asked == answered,
        // A server that could not read the question cannot repeat it.
        (Ok(_), Err(_)) => answer.header_counts().qdcount() == 0 && is_failure(answer.as_slice()),
        (Err(_), _) => false,
    }
}

/// Whether another server may know more: this one has failed, or does not serve us.
pub fn is_failure(answer: &[u8]) -> bool {
    let known = Message::from_slice(answer).map(|answer| answer.header().rcode());
    !matches!(known, Ok(Rcode::NOERROR | Rcode::NXDOMAIN))
}

/// The number of a message.
pub fn id(message: &[u8]) -> Option<u16> {
    let message = Message::from_slice(message).ok()?;
    Some(message.header().id())
}

/// Gives a message another number.
pub fn set_id(message: &mut [u8], id: u16) {
    if let Ok(message) = Message::from_octets(message).as_mut() {
        message.header_mut().set_id(id);
    }
}

/// What we say to a question.
enum Records {
    Addresses(Vec<IpAddr>),
    Name(Name<Vec<u8>>),
}

/// `None` if the question is not about us. There is an answer for every type about a name
/// of ours, if often an empty one: no other server knows of it.
fn records(
    question: &Question<ParsedName<&[u8]>>,
    names: &dyn Names,
    turn: u16,
) -> Option<Records> {
    if !matches!(question.qclass(), Class::IN | Class::ANY) {
        return None;
    }
    let name = question.qname().to_string().to_ascii_lowercase();
    if let Some(mut addresses) = names.addresses(&name) {
        addresses.retain(|address| match question.qtype() {
            Rtype::A => address.is_ipv4(),
            Rtype::AAAA => address.is_ipv6(),
            other => other == Rtype::ANY,
        });
        // Who takes the first does not always get the same.
        if !addresses.is_empty() {
            let first = usize::from(turn) % addresses.len();
            addresses.rotate_left(first);
        }
        return Some(Records::Addresses(addresses));
    }
    let is_reverse = matches!(question.qtype(), Rtype::PTR | Rtype::ANY);
    let address = parse_reverse(&name).filter(|_| is_reverse)?;
    let owner = names.name_of(address)?;
    Some(Records::Name(owner.parse().ok()?))
}

/// The address that a name stands for (RFC 1035 §3.5, RFC 3596 §2.5).
fn parse_reverse(name: &str) -> Option<IpAddr> {
    if let Some(labels) = name.strip_suffix(".in-addr.arpa") {
        let mut parts = labels.rsplit('.').map(|label| label.parse().ok());
        let mut bytes = [0; 4];
        for byte in &mut bytes {
            *byte = parts.next()??;
        }
        return parts.next().is_none().then(|| Ipv4Addr::from(bytes).into());
    }
    let labels = name.strip_suffix(".ip6.arpa")?;
    let mut bits = 0;
    let mut count = 0;
    for label in labels.rsplit('.') {
        let mut digits = label.chars();
        let digit = digits.next()?.to_digit(16)?;
        count += 1;
        if count > 32 || digits.next().is_some() {
            return None;
        }
        bits = bits << 4 | u128::from(digit);
    }
    (count == 32).then(|| Ipv6Addr::from(bits).into())
}

/// The longest answer that whoever asks can take, in bytes.
fn limit(question: &Message<[u8]>, transport: Transport) -> usize {
    let most = match (transport, question.opt()) {
        (Transport::Tcp, _) => u16::MAX,
        (Transport::Udp, None) => UDP_MAX,
        (Transport::Udp, Some(opt)) => opt.udp_payload_size().clamp(UDP_MAX, EDNS_UDP_MAX),
    };
    most.into()
}

/// An answer of ours, or that it is too long.
fn answer(question: &Message<[u8]>, records: &Records, limit: usize) -> Option<Vec<u8>> {
    let whole = compose(question, records, limit);
    whole
        .or_else(|_| {
            let mut cut = compose(question, &Records::Addresses(Vec::new()), limit)?;
            if let Ok(message) = Message::from_octets(cut.as_mut_slice()).as_mut() {
                message.header_mut().set_tc(true);
            }
            Ok::<_, PushError>(cut)
        })
        .ok()
}

fn compose(
    question: &Message<[u8]>,
    records: &Records,
    limit: usize,
) -> Result<Vec<u8>, PushError> {
    let mut answer = begin(question, Rcode::NOERROR, limit)?.answer();
    answer.header_mut().set_aa(true);
    answer.header_mut().set_ra(true);
    push_records(question, records, &mut answer)?;
    let mut additional = answer.additional();
    push_opt(question, &mut additional)?;
    Ok(additional.finish())
}

fn push_records(
    question: &Message<[u8]>,
    records: &Records,
    to: &mut AnswerBuilder<Vec<u8>>,
) -> Result<(), PushError> {
    let Ok(question) = question.sole_question() else {
        return Ok(());
    };
    let owner = question.qname();
    match records {
        Records::Addresses(addresses) => addresses.iter().try_for_each(|address| match *address {
            IpAddr::V4(address) => to.push((owner, Class::IN, TTL, A::new(address))),
            IpAddr::V6(address) => to.push((owner, Class::IN, TTL, Aaaa::new(address))),
        }),
        Records::Name(name) => to.push((owner, Class::IN, TTL, Ptr::new(name))),
    }
}

/// Who speaks EDNS is answered in it (RFC 6891 §7), and told if it is of a version that
/// we do not know (§6.1.3).
fn push_opt(
    question: &Message<[u8]>,
    to: &mut AdditionalBuilder<Vec<u8>>,
) -> Result<(), PushError> {
    let Some(asked) = question.opt() else {
        return Ok(());
    };
    to.opt(|opt| {
        opt.set_udp_payload_size(EDNS_UDP_MAX);
        if asked.version() != 0 {
            opt.set_rcode(OptRcode::BADVERS);
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests;
