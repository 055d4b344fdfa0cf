//! The fields of tar headers and pax records.

use crate::error::{Error, Result};

/// A text field, which ends at its first NUL.
pub fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|b| *b == 0).next().unwrap_or_default()
}

/// A header's numeric field: octal text, or GNU's base 256 when the first bit is set.
/// Blank is 0, as other readers have it.
pub fn number(field: &[u8]) -> Result<i64> {
    let Some((first, rest)) = field.split_first() else {
        return Ok(0);
    };
    if first & 0x80 != 0 {
        // Two's complement, big endian; the first bit only marks the format.
        let negative = first & 0x40 != 0;
        let start = i128::from(first & 0x3f) - if negative { 0x40 } else { 0 };
        let mut value = start;
        for byte in rest {
            value = (value << 8) | i128::from(*byte);
            if i64::try_from(value).is_err() {
                return Err(tar("a number out of range"));
            }
        }
        return Ok(value as i64);
    }
    let text = until_nul(field).trim_ascii();
    let mut value: i64 = 0;
    for byte in text {
        if !(b'0'..=b'7').contains(byte) {
            return Err(tar("a header field that is no number"));
        }
        value = value
            .checked_mul(8)
            .and_then(|v| v.checked_add(i64::from(byte - b'0')))
            .ok_or_else(|| tar("a number out of range"))?;
    }
    Ok(value)
}

/// A numeric field that cannot be negative.
pub fn unsigned(field: &[u8]) -> Result<u64> {
    u64::try_from(number(field)?).map_err(|_| tar("a negative number"))
}

/// A pax number.
pub fn decimal(text: &[u8]) -> Result<u64> {
    std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| tar("a pax number out of range"))
}

/// `[-]SECONDS[.FRACTION]` as seconds rounded down, and nanoseconds.
pub fn pax_time(text: &[u8]) -> Result<(i64, u32)> {
    let bad = || tar("a malformed pax time");
    let text = std::str::from_utf8(text).map_err(|_| bad())?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().map_err(|_| bad())?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad());
    }
    let nanos = fraction
        .bytes()
        .chain(std::iter::repeat(b'0'))
        .take(9)
        .fold(0, |value, digit| value * 10 + u32::from(digit - b'0'));
    if whole.starts_with('-') && nanos > 0 {
        return Ok((
            seconds.checked_sub(1).ok_or_else(bad)?,
            1_000_000_000 - nanos,
        ));
    }
    Ok((seconds, nanos))
}

/// The sum of all bytes, the sum's own field taken as blanks. Some old writers
/// summed signed bytes.
pub fn check_sum(block: &[u8; 512]) -> Result<()> {
    let declared = number(&block[148..156])?;
    let bytes = || {
        block
            .iter()
            .enumerate()
            .map(|(i, b)| if (148..156).contains(&i) { b' ' } else { *b })
    };
    let plain: i64 = bytes().map(i64::from).sum();
    let signed: i64 = bytes().map(|b| i64::from(b as i8)).sum();
    if declared != plain && declared != signed {
        return Err(tar("a header with a wrong checksum"));
    }
    Ok(())
}

/// Refuses the stream.
pub fn tar(what: &str) -> Error {
    Error::Tar(what.to_owned())
}
