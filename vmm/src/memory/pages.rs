//! Sets of pages.

use serde::{Deserialize, Serialize};
use std::ops::Range;
use vm_run_abi::PAGE_SIZE;

/// Pages of a guest's memory, by their number in the memory file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PageSet {
    /// A bit for each page, from the lowest of the first word on.
    words: Vec<u64>,
}

/// Pages one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// The number of the first.
    pub first: u64,
    /// How many: at least one.
    pub count: u64,
}

impl Run {
    /// Where they lie in the memory file, in bytes.
    pub fn bytes(self) -> Range<u64> {
        let at = self.first * PAGE_SIZE;
        at..at + self.count * PAGE_SIZE
    }
}

impl PageSet {
    /// None of the pages of a memory of so many bytes.
    pub(crate) fn none_of(bytes: u64) -> Self {
        let words = bytes.div_ceil(PAGE_SIZE * 64) as usize;
        Self {
            words: vec![0; words],
        }
    }

    /// Adds `pages`, a bit for each page from the one at `offset` bytes on, which is the
    /// first of a word.
    ///
    /// What lies behind the memory is left out.
    pub(crate) fn add_words(&mut self, offset: u64, pages: &[u64]) {
        let from = (offset / (PAGE_SIZE * 64)) as usize;
        for (word, more) in self.words.iter_mut().skip(from).zip(pages) {
            *word |= more;
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.add_words(0, &other.words);
    }

    pub(crate) fn remove(&mut self, other: &Self) {
        for (word, less) in self.words.iter_mut().zip(&other.words) {
            *word &= !less;
        }
    }

    /// The pages that are in both.
    pub(crate) fn common(&self, other: &Self) -> Self {
        let words = self.words.iter().zip(&other.words);
        Self {
            words: words.map(|(one, other)| one & other).collect(),
        }
    }

    pub(crate) fn contains(&self, page: u64) -> bool {
        let word = self.words.get((page / 64) as usize);
        word.is_some_and(|word| word & 1 << (page % 64) != 0)
    }

    pub(crate) fn clear(&mut self) {
        self.words.fill(0);
    }

    pub(crate) fn insert(&mut self, run: Run) {
        for page in run.first..run.first + run.count {
            if let Some(word) = self.words.get_mut((page / 64) as usize) {
                *word |= 1 << (page % 64);
            }
        }
    }

    /// Fills gaps, the smallest first, until there are no more runs than `most`: each block
    /// of pages that has one has all.
    pub(crate) fn widen(&mut self, most: usize) {
        let mut block = 2;
        while self.runs().count() > most {
            let runs: Vec<Run> = self.runs().collect();
            for run in runs {
                let first = run.first / block * block;
                let end = (run.first + run.count).next_multiple_of(block);
                let count = end - first;
                self.insert(Run { first, count });
            }
            block *= 2;
        }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// All of them, in order, none beside another.
    pub(crate) fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            let first = self.find(next, |word| word)?;
            let end = self.find(first, |word| !word);
            let end = end.unwrap_or(self.words.len() as u64 * 64);
            next = end;
            Some(Run {
                first,
                count: end - first,
            })
        })
    }

    /// The first page from `from` on whose bit in `look(word)` is set.
    fn find(&self, from: u64, look: impl Fn(u64) -> u64) -> Option<u64> {
        let mut at = (from / 64) as usize;
        let mut word = look(*self.words.get(at)?) & (u64::MAX << (from % 64));
        while word == 0 {
            at += 1;
            word = look(*self.words.get(at)?);
        }
        Some(at as u64 * 64 + u64::from(word.trailing_zeros()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn of(runs: &[(u64, u64)]) -> PageSet {
        let mut pages = PageSet::none_of(2 * MIB);
        for &(first, count) in runs {
            pages.insert(Run { first, count });
        }
        pages
    }

    fn runs(pages: &PageSet) -> Vec<(u64, u64)> {
        pages.runs().map(|run| (run.first, run.count)).collect()
    }

    #[test]
    fn runs_are_what_was_put_in() {
        for expected in [
            &[][..],
            &[(0, 1)],
            &[(511, 1)],
            &[(0, 512)],
            &[(63, 2), (127, 130), (300, 1), (302, 1)],
        ] {
            let pages = of(expected);
            assert_eq!(runs(&pages), expected);
            let count: u64 = expected.iter().map(|(_, count)| count).sum();
            assert_eq!((pages.count(), pages.is_empty()), (count, count == 0));
        }
        assert_eq!(runs(&of(&[(3, 2), (5, 1)])), [(3, 3)]);
        let run = Run { first: 3, count: 2 };
        assert_eq!(run.bytes(), 0x3000..0x5000);
    }

    #[test]
    fn gaps_are_filled_until_there_are_few_runs() {
        let mut pages = of(&[(1, 1), (4, 1), (6, 1), (64, 1), (511, 1)]);
        pages.widen(5);
        assert_eq!(pages.count(), 5);
        pages.widen(4);
        assert_eq!(runs(&pages), [(0, 2), (4, 4), (64, 2), (510, 2)]);
        pages.widen(3);
        assert_eq!(runs(&pages), [(0, 8), (64, 4), (508, 4)]);
        pages.widen(1);
        assert_eq!(runs(&pages), [(0, 512)]);
    }

    #[test]
    fn sets_are_joined_and_taken_apart() {
        let mut pages = of(&[(0, 10), (100, 10)]);
        pages.add(&of(&[(10, 2), (400, 1)]));
        assert_eq!(runs(&pages), [(0, 12), (100, 10), (400, 1)]);
        pages.remove(&of(&[(5, 100)]));
        assert_eq!(runs(&pages), [(0, 5), (105, 5), (400, 1)]);
        pages.add_words(256 * PAGE_SIZE, &[0b110]);
        assert_eq!(runs(&pages)[2], (257, 2));
        assert_eq!(
            runs(&pages.common(&of(&[(4, 2), (399, 3)]))),
            [(4, 1), (400, 1)]
        );
        // No page is there.
        pages.add_words(2 * MIB, &[1]);
        pages.add_words(2 * MIB - 64 * PAGE_SIZE, &[0, 1]);
        pages.insert(Run {
            first: 511,
            count: 9,
        });
        assert_eq!(pages.count(), 5 + 5 + 2 + 1 + 1);
    }
}
