//! Two walks compared, with a list of differences that are meant.

use std::collections::BTreeMap;

/// What a comparison found, one line for each finding; none if all is well.
///
/// `reference` and `measured` are walks: `entry<TAB>answer`. `allowed` has
/// `entry<TAB>answer of the reference<TAB>answer measured<TAB>reason`, and lines
/// that begin with `#`. A difference that is allowed but is not there is a
/// finding too, so that the list stays true.
pub fn compare(reference: &str, measured: &str, allowed: &str) -> Vec<String> {
    let reference = walk(reference);
    let measured = walk(measured);
    let mut found = Vec::new();
    let mut excused = BTreeMap::new();
    for line in allowed
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        match line.split('\t').collect::<Vec<_>>()[..] {
            [entry, before, after, reason] if !reason.trim().is_empty() => {
                excused.insert(entry, (before, after));
            }
            _ => found.push(format!("not an allowed difference: {line}")),
        }
    }
    for entry in reference.keys().chain(
        measured
            .keys()
            .filter(|entry| !reference.contains_key(*entry)),
    ) {
        let before = reference.get(entry).copied().unwrap_or("not asked");
        let after = measured.get(entry).copied().unwrap_or("not asked");
        match excused.remove(entry) {
            Some(pair) if pair == (before, after) => {}
            Some(_) => found.push(format!(
                "{entry}: allowed, but now {before} there and {after} here"
            )),
            None if before == after => {}
            None => found.push(format!("{entry}: {before} there, {after} here")),
        }
    }
    found.extend(
        excused
            .keys()
            .map(|entry| format!("{entry}: allowed, but never asked")),
    );
    found
}

fn walk(text: &str) -> BTreeMap<&str, &str> {
    text.lines()
        .filter_map(|line| line.trim_end().split_once('\t'))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::compare;

    const REFERENCE: &str = "call a\tok\ncall b\tEPERM\n";

    #[test]
    fn the_same_is_well_and_a_difference_is_found() {
        assert!(compare(REFERENCE, REFERENCE, "").is_empty());
        let found = compare(REFERENCE, "call a\tENOSYS\ncall b\tEPERM\n", "# none\n");
        assert_eq!(found, ["call a: ok there, ENOSYS here"]);
        assert_eq!(
            compare(REFERENCE, "call a\tok\n", ""),
            ["call b: EPERM there, not asked here"]
        );
    }

    #[test]
    fn an_allowed_difference_must_be_that_very_one() {
        let measured = "call a\tok\ncall b\tENOSYS\n";
        assert!(compare(REFERENCE, measured, "call b\tEPERM\tENOSYS\tno modules\n").is_empty());
        assert_eq!(
            compare(REFERENCE, measured, "call b\tEPERM\tEINVAL\tno modules\n").len(),
            1
        );
        assert_eq!(
            compare(REFERENCE, REFERENCE, "call b\tEPERM\tENOSYS\tno modules\n").len(),
            1
        );
        assert_eq!(
            compare(REFERENCE, REFERENCE, "call c\tok\tENOSYS\twhy\n").len(),
            1
        );
        assert_eq!(
            compare(REFERENCE, measured, "call b\tEPERM\tENOSYS\t \n").len(),
            2
        );
    }

    /// docs/kernel.md shows the list to people; it must be the list.
    #[test]
    fn the_manual_shows_the_allowed_differences() {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
        let read = |path: &str| std::fs::read_to_string(format!("{root}/{path}")).expect(path);
        let manual = read("docs/kernel.md");
        for line in read("guest-kernel/walk/allowed")
            .lines()
            .filter(|line| !line.starts_with('#') && !line.is_empty())
        {
            let row = format!("| {} |", line.split('\t').collect::<Vec<_>>().join(" | "));
            assert!(
                manual.contains(&row),
                "docs/kernel.md lacks this row of its table:\n{row}"
            );
        }
        let rows = manual
            .split("<!-- allowed -->")
            .nth(1)
            .expect("the marked table")
            .lines();
        let rows = rows.filter(|row| row.starts_with("| ")).count() - 1;
        assert_eq!(
            rows,
            read("guest-kernel/walk/allowed")
                .lines()
                .filter(|l| !l.starts_with('#') && !l.is_empty())
                .count()
        );
    }
}
