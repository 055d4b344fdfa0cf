//! Templates on disk, and what a checkpoint of a child of one costs.

use crate::child;
use crate::live::{LOAD, begins, template};
use crate::soak::workers;
use fork::{Manifest, Place, Pool, Template};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

const PAGE: u64 = 4096;

/// A template, a checkpoint of a child of it, and one of a child of that, by their numbers.
fn chain(dir: &Path) -> Vec<Template> {
    let first = template(&LOAD);
    first.save(&dir.join("0")).expect("saves");
    let host = first.host();
    let open = |name: &str| Template::open(Arc::clone(host), &dir.join(name)).expect("opens");
    let mut opened = vec![open("0")];
    for number in 1..3 {
        let mut source = opened[number - 1].fork(child("source")).expect("forks");
        begins(&mut source);
        let (picture, cost) = source.capture("", None).expect("is captured");
        let name = number.to_string();
        let path = dir.join(&name);
        let manifest = picture.save(&path).expect("saves");
        manifest.verify(&path).expect("is what was written");
        assert_eq!(manifest.memory.len(), number + 1);
        // The new layer, and no more of it than its pages.
        let layer = path.join(format!("memory.{}", number - 1));
        let allocated = layer.metadata().expect("stats").blocks() * 512;
        let most = cost.pages * PAGE + (64 << 10);
        assert!(allocated > 0 && allocated <= most, "{allocated} of {most}");
        let again = open(&name);
        assert!(memory(&again) == memory(&picture));
        opened.push(again);
    }
    opened
}

fn memory(template: &Template) -> Vec<u8> {
    let image = template.image().flatten().expect("is one file");
    let mut all = vec![0; image.bytes() as usize];
    image.base().read_exact_at(&mut all, 0).expect("reads");
    all
}

fn ino(path: &Path) -> u64 {
    path.metadata().expect("stats").ino()
}

#[test]
fn a_checkpoint_has_its_sources_files_and_its_own_pages() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name);
    let opened = chain(dir.path());
    assert_eq!(ino(&path("0/memory")), ino(&path("1/memory")));
    assert_eq!(ino(&path("1/memory")), ino(&path("2/memory")));
    assert_eq!(ino(&path("1/memory.0")), ino(&path("2/memory.0")));
    let host = Arc::clone(opened[0].host());
    let expected = memory(&opened[2]);
    drop(opened);
    for gone in ["0", "1"] {
        fs::remove_dir_all(path(gone)).expect("removes");
    }
    let manifest = Manifest::read(&path("2")).expect("reads");
    manifest.verify(&path("2")).expect("is what was written");
    let last = Template::open(host, &path("2")).expect("opens");
    assert!(memory(&last) == expected);
    let last = Arc::new(last);
    let workers = Place::Workers(Arc::new(workers()));
    for place in [Place::ThisProcess, workers] {
        let pool = Pool::new(Arc::clone(&last), place, 1).expect("a pool");
        let mut child = pool.fork(child("one")).expect("forks");
        let answer = child.answer().expect("answers");
        assert_eq!(Some(answer), child.generation());
    }
}

#[test]
fn a_checkpoint_that_is_spoilt_is_found() {
    let dir = tempfile::tempdir().expect("a directory");
    let opened = chain(dir.path());
    let path = dir.path().join("2");
    let manifest = Manifest::read(&path).expect("reads");
    let layers = opened[2].image().layers();
    let runs = layers.map(|(_, runs)| runs[0].bytes().start);
    let firsts: Vec<u64> = std::iter::once(0).chain(runs).collect();
    for (file, at) in manifest.files()[1..].iter().zip(firsts) {
        let (name, dir, path) = (&file.name, &path, path.join(&file.name));
        let good = fs::read(&path).expect("reads");
        // The file is another template's as well.
        fs::remove_file(&path).expect("removes");
        let mut spoilt = good.clone();
        spoilt[at as usize + 8] ^= 1;
        fs::write(&path, spoilt).expect("writes");
        let line = manifest.verify(dir).expect_err("spoilt").to_string();
        let expected = format!("its {name} is not what was written");
        assert!(line.contains(&expected) && !line.contains('\n'), "{line}");
        File::create(&path)
            .and_then(|file| file.write_all_at(&good[..good.len() - 1], 0))
            .expect("writes");
        let host = Arc::clone(opened[0].host());
        let line = Template::open(host, dir).expect_err("cut short");
        let expected = format!("its {name} is cut short");
        assert!(line.to_string().contains(&expected), "{line}");
        fs::write(&path, good).expect("writes");
    }
    manifest.verify(&path).expect("is what was written");
    // Of another memory.
    fs::copy(dir.path().join("1/state"), path.join("state")).expect("copies");
    let line = manifest.verify(&path).expect_err("another").to_string();
    assert!(line.contains("its state is not what was written"), "{line}");
}
