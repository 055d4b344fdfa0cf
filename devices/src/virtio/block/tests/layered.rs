//! Disks of several files, against plain models of them.

use super::*;
use std::path::PathBuf;

/// In bytes: some blocks, and a part of one.
const LEN: usize = 40 * 4096 + 1536;
const SECTORS: u64 = LEN as u64 / SECTOR_SIZE;

/// Random numbers that are the same each time (xorshift64*).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) % limit
    }

    /// Some sectors of the disk: the first, and how many.
    fn range(&mut self) -> (u64, u64) {
        let start = self.below(SECTORS);
        (start, 1 + self.below((SECTORS - start).min(40)))
    }
}

/// A disk, its files, and what is to be in it.
struct Disk {
    guest: FakeGuest<Block>,
    files: Vec<PathBuf>,
    model: Vec<u8>,
}

impl Disk {
    fn open(files: Vec<PathBuf>, model: Vec<u8>) -> Self {
        let all = files.iter().map(|path| open(path)).collect();
        let mut disk = Block::restore(&state(false)).unwrap();
        disk.bind(DiskFiles(all)).unwrap();
        Self {
            guest: FakeGuest::boot(disk),
            files,
            model,
        }
    }

    fn check(&mut self, (sector, count): (u64, u64)) {
        let range = bytes_of(sector, count);
        let (status, data) = read(&mut self.guest, sector, range.len());
        assert_eq!(status, S_OK);
        assert!(
            data == self.model[range],
            "{sector} and {count}: {:?}",
            self.files
        );
    }

    fn check_all(&mut self) {
        for sector in (0..SECTORS).step_by(40) {
            self.check((sector, (SECTORS - sector).min(40)));
        }
    }

    fn write(&mut self, dice: &mut Dice) {
        let (sector, count) = dice.range();
        let range = bytes_of(sector, count);
        let data: Vec<u8> = range.clone().map(|_| dice.below(255) as u8 + 1).collect();
        assert_eq!(write(&mut self.guest, sector, &data), S_OK);
        self.model[range].copy_from_slice(&data);
    }

    fn clear(&mut self, dice: &mut Dice) {
        let (sector, count) = dice.range();
        let kind = [T_DISCARD, T_WRITE_ZEROES][dice.below(2) as usize];
        let flags = if kind == T_WRITE_ZEROES {
            dice.below(2) as u32
        } else {
            0
        };
        let payload = segment(sector, count as u32, flags);
        assert_eq!(command(&mut self.guest, kind, payload), S_OK);
        let range = bytes_of(sector, count);
        if kind == T_DISCARD {
            // Of a block in part it may do nothing.
            let (_, data) = read(&mut self.guest, sector, range.len());
            for (at, now) in range.clone().zip(data) {
                let block = at / 4096 * 4096;
                let is_whole = range.start <= block && (block + 4096).min(LEN) <= range.end;
                let before = self.model[at];
                assert!(now == 0 || (!is_whole && now == before), "{at}: {now}");
                self.model[at] = now;
            }
        } else {
            self.model[range].fill(0);
        }
    }

    fn flush(&mut self) {
        assert_eq!(command(&mut self.guest, T_FLUSH, vec![]), S_OK);
    }

    /// All that is between the lowest and the one that is written becomes one.
    fn merge(&mut self, into: PathBuf) {
        let between = 1..self.files.len() - 1;
        let overlays: Vec<File> = self.files[between.clone()]
            .iter()
            .map(|path| open(path))
            .collect();
        let file = File::create_new(&into).unwrap();
        merge_overlays(&overlays, LEN as u64, &file).unwrap();
        let mut disk = self.guest.device();
        disk.device_mut()
            .replace(between.len(), open(&into))
            .unwrap();
        drop(disk);
        self.files.splice(between, [into]);
    }

    fn cover(&mut self, top: PathBuf) {
        let file = open(&top);
        self.guest.device().device_mut().cover(file).unwrap();
        self.files.push(top);
    }
}

fn bytes_of(sector: u64, count: u64) -> std::ops::Range<usize> {
    let byte = |sector: u64| (sector * SECTOR_SIZE) as usize;
    byte(sector)..byte(sector + count)
}

/// A fresh overlay.
fn overlay(dir: &Path, number: &mut u32) -> PathBuf {
    *number += 1;
    let path = dir.join(number.to_string());
    let file = File::create_new(&path).unwrap();
    format_overlay(&file, LEN as u64).unwrap();
    path
}

fn plain(dir: &Path) -> (PathBuf, Vec<u8>) {
    let path = dir.join("plain");
    let bytes: Vec<u8> = (0..LEN).map(|n| (n % 251) as u8).collect();
    std::fs::write(&path, &bytes).unwrap();
    (path, bytes)
}

/// What was flushed is there, whatever was written after.
fn check_flushed(disk: &Disk, scratch: &Path) {
    let mut files = disk.files.clone();
    let copy = scratch.join("copy");
    std::fs::copy(files.pop().unwrap(), &copy).unwrap();
    files.push(copy);
    let all: Vec<File> = files.iter().map(|path| open(path)).collect();
    let Some((top, below)) = all.split_last() else {
        return;
    };
    // The layers below are locked by others, who only read them.
    let mut cut = vec![0; LEN];
    for block in 0..LEN.div_ceil(4096) {
        let range = block * 4096..(block * 4096 + 4096).min(LEN);
        let has = |file: &File| {
            bitmap::Bitmap::read(file, LEN as u64).is_ok_and(|bitmap| bitmap.has(block as u64))
        };
        let owner = [top]
            .into_iter()
            .chain(below.iter().rev())
            .find(|file| has(file));
        let owner = owner.or(below.first()).unwrap_or(top);
        bitmap::read_all(owner, &mut cut[range.clone()], range.start as u64).unwrap();
    }
    assert!(cut == disk.model, "{:?}", disk.files);
}

#[test]
fn a_family_of_disks_is_as_its_models_are() {
    for seed in 1..=6 {
        let dir = tempfile::tempdir().unwrap();
        let mut dice = Dice(seed);
        let mut made = 0;
        let (path, bytes) = plain(dir.path());
        let mut family = vec![Disk::open(vec![path], bytes)];
        for _ in 0..600 {
            let which = dice.below(family.len() as u64) as usize;
            match dice.below(24) {
                0..8 => family[which].write(&mut dice),
                8..14 => {
                    let range = dice.range();
                    family[which].check(range);
                }
                14..18 => family[which].clear(&mut dice),
                18..20 => {
                    family[which].flush();
                    check_flushed(&family[which], dir.path());
                }
                20 => {
                    // Its owner has ended it in order, and opens it again.
                    let old = family.swap_remove(which);
                    let (files, model) = (old.files.clone(), old.model.clone());
                    drop(old);
                    family.push(Disk::open(files, model));
                }
                21 if family.len() > 1 => drop(family.swap_remove(which)),
                22 if family[which].files.len() > 2 => {
                    made += 1;
                    family[which].merge(dir.path().join(made.to_string()));
                    family[which].check_all();
                }
                _ if family.len() < 6 && family[which].files.len() < 12 => {
                    let below = family[which].files.clone();
                    let model = family[which].model.clone();
                    let top = overlay(dir.path(), &mut made);
                    family[which].cover(top);
                    let own = overlay(dir.path(), &mut made);
                    family.push(Disk::open([below, vec![own]].concat(), model));
                }
                _ => {}
            }
        }
        family.iter_mut().for_each(Disk::check_all);
    }
}

#[test]
fn what_is_below_is_written_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let (path, bytes) = plain(dir.path());
    let mut disk = Disk::open(vec![path.clone()], bytes.clone());
    let mut made = 0;
    disk.cover(overlay(dir.path(), &mut made));
    let mut dice = Dice(7);
    for _ in 0..50 {
        disk.write(&mut dice);
        disk.clear(&mut dice);
    }
    disk.flush();
    disk.check_all();
    assert!(contents(&path) == bytes);
    // It may be below others', who only read it, and nobody's to be written.
    let mut other = Block::restore(&state(false)).unwrap();
    let own = open(&overlay(dir.path(), &mut made));
    other.bind(DiskFiles(vec![open(&path), own])).unwrap();
    assert!(matches!(
        bound(&state(false), open(&path)),
        Err(BlockError::InUse)
    ));
    let top = open(&disk.files[1]);
    let mut third = Block::restore(&state(false)).unwrap();
    let refused = third.bind(DiskFiles(vec![open(&path), top]));
    assert!(matches!(refused, Err(BlockError::InUse)), "{refused:?}");
}

#[test]
fn a_file_that_is_no_layer_of_the_disk_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (path, bytes) = plain(dir.path());
    let bad = |name: &str, make: &dyn Fn(&File)| {
        let path = dir.path().join(name);
        let file = File::create_new(&path).unwrap();
        make(&file);
        path
    };
    let size = LEN as u64;
    let files = [
        bad("empty", &|_| ()),
        bad("of another", &|file| {
            format_overlay(file, size + 4096).unwrap()
        }),
        bad("of a byte less", &|file| {
            format_overlay(file, size - 1).unwrap()
        }),
        bad("zeroes", &|file| {
            format_overlay(file, size).unwrap();
            let end = file.metadata().unwrap().len();
            file.set_len(end - 4096).unwrap();
            file.set_len(end).unwrap();
        }),
        bad("longer", &|file| {
            format_overlay(file, size).unwrap();
            let end = file.metadata().unwrap().len();
            file.set_len(end + 1).unwrap();
        }),
    ];
    let mut disk = Disk::open(vec![path.clone()], bytes);
    for file in files {
        let refused = disk.guest.device().device_mut().cover(open(&file));
        assert!(matches!(refused, Err(BlockError::Overlay(_))), "{file:?}");
    }
    // Nothing has changed.
    disk.write(&mut Dice(1));
    disk.check_all();
    drop(disk);
    let many = |count| DiskFiles((0..count).map(|_| open(&path)).collect());
    for count in [0, LAYERS_MAX + 1] {
        let refused = Block::restore(&state(false)).unwrap().bind(many(count));
        assert!(matches!(refused, Err(BlockError::TooManyLayers(_))));
    }
    let refused = Block::restore(&state(true)).unwrap().bind(many(2));
    assert!(matches!(refused, Err(BlockError::TooManyLayers(2))));
}
