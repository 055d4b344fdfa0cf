use super::*;
use crate::image::limits::Limits;

/// An image in the making: entries as words.
struct Layers {
    tree: Tree,
    file: Arc<File>,
    layer: u16,
}

impl Layers {
    fn new() -> Layers {
        let file = Arc::new(tempfile::tempfile().unwrap());
        Layers {
            tree: Tree::new(&Limits::default()),
            file,
            layer: 0,
        }
    }

    fn next(&mut self) {
        self.layer += 1;
    }

    fn add(&mut self, kind: Kind, path: &str, link: &str) -> Result<()> {
        let entry = Entry {
            path: path.into(),
            link: link.into(),
            kind,
            mode: 0o700 + self.layer,
            uid: 0,
            gid: 0,
            mtime: 0,
            mtime_nsec: 0,
            device: (0, 0),
            xattrs: Vec::new(),
            size: 0,
            pieces: Vec::new(),
        };
        apply(&mut self.tree, entry, self.layer, &self.file)
    }

    fn file(&mut self, path: &str) {
        self.add(Kind::Regular, path, "").unwrap();
    }

    /// All paths, with a slash behind directories.
    fn paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        list(&self.tree, Tree::ROOT, "", &mut paths);
        paths
    }
}

fn list(tree: &Tree, directory: NodeId, prefix: &str, paths: &mut Vec<String>) {
    for (name, link) in tree.children(directory).into_iter().flatten() {
        let path = format!("{prefix}{}", String::from_utf8_lossy(name));
        match tree.children(link.node) {
            Some(_) => {
                paths.push(format!("{path}/"));
                list(tree, link.node, &format!("{path}/"), paths);
            }
            None => paths.push(path),
        }
    }
}

#[test]
fn a_whiteout_hides_lower_layers_and_not_its_own() {
    let mut image = Layers::new();
    image.file("d/lower");
    image.file("d/both");
    image.file("e/lower");
    image.next();
    image.file("e/own");
    image.file("d/both");
    image.file("d/.wh.lower");
    image.file("d/.wh.both");
    image.file(".wh.e");
    image.file(".wh.nothing");
    assert_eq!(image.paths(), ["d/", "d/both", "e/", "e/own"]);
}

#[test]
fn an_opaque_directory_hides_all_of_lower_layers_at_any_depth() {
    for marker_first in [true, false] {
        let mut image = Layers::new();
        image.file("d/a/b/c");
        image.file("d/x");
        image.next();
        if marker_first {
            image.file("d/.wh..wh..opq");
        }
        image.file("d/a/new");
        if !marker_first {
            image.file("d/.wh..wh..opq");
        }
        assert_eq!(
            image.paths(),
            ["d/", "d/a/", "d/a/new"],
            "marker first: {marker_first}"
        );
    }
}

#[test]
fn aufs_names_are_passed_over_and_malformed_whiteouts_refused() {
    let mut image = Layers::new();
    image.file(".wh..wh.plnk");
    assert!(image.paths().is_empty());
    for bad in ["d/.wh.", "d/.wh..", "d/.wh..."] {
        assert!(
            matches!(
                image.add(Kind::Regular, bad, ""),
                Err(ImageError::Entry { .. })
            ),
            "{bad}"
        );
    }
}

#[test]
fn leading_slashes_and_dots_are_nothing_and_dot_dot_is_refused() {
    let mut image = Layers::new();
    image.file("/abs");
    image.file("./dot");
    assert_eq!(image.paths(), ["abs", "dot"]);
    for bad in ["../x", "a/../../x", "a/..", "/.."] {
        let error = image.add(Kind::Regular, bad, "").unwrap_err();
        assert!(error.to_string().contains(bad), "{error}");
    }
    for bad in ["../x", "/../x"] {
        assert!(matches!(
            image.add(Kind::HardLink, "h", bad),
            Err(ImageError::Entry { .. })
        ));
    }
    assert!(image.add(Kind::HardLink, "h", "missing").is_err());
    image.add(Kind::HardLink, "h", "/abs").unwrap();
    assert_eq!(
        image.tree.lookup(Tree::ROOT, b"h").unwrap().node,
        image.tree.lookup(Tree::ROOT, b"abs").unwrap().node
    );
}

#[test]
fn a_parent_that_is_a_link_is_followed_inside_the_image() {
    let mut image = Layers::new();
    image.add(Kind::Directory, "usr/lib", "").unwrap();
    image.add(Kind::Symlink, "lib", "usr/lib").unwrap();
    image.add(Kind::Symlink, "out", "/../../etc").unwrap();
    image.add(Kind::Symlink, "up", "../../..").unwrap();
    image.file("lib/a");
    image.file("out/passwd");
    image.file("up/b");
    assert_eq!(
        image.paths(),
        [
            "b",
            "etc/",
            "etc/passwd",
            "lib",
            "out",
            "up",
            "usr/",
            "usr/lib/",
            "usr/lib/a"
        ]
    );
    image.add(Kind::Symlink, "x", "y").unwrap();
    image.add(Kind::Symlink, "y", "x").unwrap();
    assert!(
        image
            .add(Kind::Regular, "x/f", "")
            .unwrap_err()
            .to_string()
            .contains("too many symbolic links")
    );
    image.file("f");
    assert!(
        image
            .add(Kind::Regular, "f/g", "")
            .unwrap_err()
            .to_string()
            .contains("not a directory")
    );
}

#[test]
fn a_later_entry_takes_an_earlier_one_s_place() {
    let mut image = Layers::new();
    image.file("d/f");
    image.add(Kind::Symlink, "s", "d").unwrap();
    image.next();
    image.add(Kind::Directory, "d", "").unwrap();
    image.add(Kind::Directory, "s", "").unwrap();
    assert_eq!(image.paths(), ["d/", "d/f", "s/"]);
    let directory = image.tree.lookup(Tree::ROOT, b"d").unwrap().node;
    assert_eq!(image.tree.node(directory).meta.mode, 0o701);
    image.file("d");
    assert_eq!(image.paths(), ["d", "s/"]);
}

#[test]
fn a_tree_that_is_too_large_is_refused() {
    let limits = Limits {
        inodes: 10,
        depth: 5,
        metadata: 1000,
        ..Limits::default()
    };
    let mut image = Layers::new();
    image.tree = Tree::new(&limits);
    assert!(matches!(
        image.add(Kind::Regular, "a/b/c/d/e/f/g", ""),
        Err(ImageError::Limit(_))
    ));
    let error = (0..10).find_map(|i| image.add(Kind::Regular, &format!("f{i}"), "").err());
    assert!(matches!(error, Some(ImageError::Limit(_))));
    image.tree = Tree::new(&limits);
    let error = (0..9).find_map(|i| {
        image
            .add(Kind::Symlink, &format!("s{i}"), &"t".repeat(200))
            .err()
    });
    assert!(matches!(error, Some(ImageError::Limit(_))));
    let long = "n".repeat(256);
    assert!(matches!(
        image.add(Kind::Regular, &long, ""),
        Err(ImageError::Entry { .. })
    ));
}
