//! Who the process runs as: `USER[:GROUP]` against the image's `/etc/passwd` and
//! `/etc/group`, by the rules of docker (moby/sys/user, `GetExecUser`).

use std::fmt;

/// The numbers behind a `USER[:GROUP]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The user.
    pub uid: u32,
    /// The primary group.
    pub gid: u32,
    /// The supplementary groups; the primary one is always the first.
    pub groups: Vec<u32>,
    /// For `$HOME`.
    pub home: String,
}

impl User {
    /// The same user in more groups, each a name or a number, as docker's `--group-add`
    /// has it. A number need not be in the file.
    pub fn and_in(mut self, more: &[String], group: &str) -> Result<Self, NoSuch> {
        for text in more {
            let wanted = Wanted::parse(text)?;
            let entry = group_entries(group).find(|entry| wanted.is(entry.name, entry.gid));
            let gid = match (entry, wanted) {
                (Some(entry), _) => entry.gid,
                (None, Wanted::Id(gid)) => gid,
                (None, Wanted::Name(name)) => return Err(NoSuch::Group(name.to_owned())),
            };
            if !self.groups.contains(&gid) {
                self.groups.push(gid);
            }
        }
        Ok(self)
    }
}

/// Why a `USER[:GROUP]` means nobody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoSuch {
    /// A name that `/etc/passwd` lacks.
    User(String),
    /// A name that `/etc/group` lacks.
    Group(String),
    /// A number above 2^31-1, where docker stops too.
    Range(String),
}

impl fmt::Display for NoSuch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(name) => write!(
                f,
                "unable to find user {name}: no matching entries in passwd file"
            ),
            Self::Group(name) => write!(
                f,
                "unable to find group {name}: no matching entries in group file"
            ),
            Self::Range(number) => {
                write!(f, "{number}: uids and gids must be in range 0-2147483647")
            }
        }
    }
}

impl std::error::Error for NoSuch {}

/// A number, a name, or a number that is out of range.
enum Wanted<'a> {
    Id(u32),
    Name(&'a str),
}

impl<'a> Wanted<'a> {
    fn parse(text: &'a str) -> Result<Self, NoSuch> {
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
            return Ok(Self::Name(text));
        }
        match text.parse::<u32>() {
            Ok(id) if id <= i32::MAX as u32 => Ok(Self::Id(id)),
            _ => Err(NoSuch::Range(text.to_owned())),
        }
    }

    fn is(&self, name: &str, id: u32) -> bool {
        match self {
            Self::Id(wanted) => *wanted == id,
            Self::Name(wanted) => *wanted == name,
        }
    }
}

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct GroupEntry<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

/// The well-formed lines of a passwd file: `name:password:uid:gid:gecos:home:shell`.
fn passwd_entries(file: &str) -> impl Iterator<Item = PasswdEntry<'_>> {
    file.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or_default();
        Some(PasswdEntry {
            name,
            uid,
            gid,
            home,
        })
    })
}

/// The well-formed lines of a group file: `name:password:gid:member,member`.
fn group_entries(file: &str) -> impl Iterator<Item = GroupEntry<'_>> {
    file.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = fields.nth(1)?.parse().ok()?;
        let members = fields.next().unwrap_or_default();
        Some(GroupEntry { name, gid, members })
    })
}

/// Resolves `spec` against the contents of the two files (empty if the image
/// lacks them). An empty `spec` is root. A number need not be in the files.
pub fn resolve(spec: &str, passwd: &str, group: &str) -> Result<User, NoSuch> {
    let (user, wanted_group) = spec.split_once(':').unwrap_or((spec, ""));
    let wanted = if user.is_empty() {
        Wanted::Id(0)
    } else {
        Wanted::parse(user)?
    };
    let entry = passwd_entries(passwd).find(|entry| wanted.is(entry.name, entry.uid));
    let (uid, mut gid) = match (&entry, &wanted) {
        (Some(entry), _) => (entry.uid, entry.gid),
        (None, Wanted::Id(uid)) => (*uid, 0),
        (None, Wanted::Name(name)) => return Err(NoSuch::User((*name).to_owned())),
    };
    let mut extra = Vec::new();
    if !wanted_group.is_empty() {
        let wanted = Wanted::parse(wanted_group)?;
        gid = match group_entries(group).find(|entry| wanted.is(entry.name, entry.gid)) {
            Some(entry) => entry.gid,
            None => match wanted {
                Wanted::Id(gid) => gid,
                Wanted::Name(name) => return Err(NoSuch::Group(name.to_owned())),
            },
        };
    } else if let Some(user) = &entry {
        let is_member = |entry: &GroupEntry<'_>| entry.members.split(',').any(|m| m == user.name);
        extra.extend(
            group_entries(group)
                .filter(is_member)
                .map(|entry| entry.gid),
        );
    }
    let mut groups = vec![gid];
    for gid in extra {
        if !groups.contains(&gid) {
            groups.push(gid);
        }
    }
    let home = match &entry {
        Some(entry) if !entry.home.is_empty() => entry.home,
        _ => "/",
    };
    Ok(User {
        uid,
        gid,
        groups,
        home: home.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
        # a comment\n\
        broken:x:notanumber:0::/:/bin/sh\n\
        daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n\
        web:x:1000:1001:Web,,,:/srv/web:/bin/sh\n\
        short:x:7:7\n\
        2000:x:5:5::/named:/bin/sh\n";
    const GROUP: &str = "root:x:0:root\nbin:x:1:root,bin\nweb:x:1001:\nadm:x:4:web,root\n\
        video:x:44:web\nbad:x::web\n";

    fn user(uid: u32, gid: u32, groups: &[u32], home: &str) -> Result<User, NoSuch> {
        Ok(User {
            uid,
            gid,
            groups: groups.to_vec(),
            home: home.to_owned(),
        })
    }

    #[test]
    fn nobody_asked_for_is_root_with_its_groups() {
        assert_eq!(resolve("", PASSWD, GROUP), user(0, 0, &[0, 1, 4], "/root"));
        assert_eq!(resolve("", "", ""), user(0, 0, &[0], "/"));
    }

    #[test]
    fn names_and_numbers() {
        let web = user(1000, 1001, &[1001, 4, 44], "/srv/web");
        assert_eq!(resolve("web", PASSWD, GROUP), web);
        assert_eq!(resolve("1000", PASSWD, GROUP), web);
        assert_eq!(resolve("short", PASSWD, GROUP), user(7, 7, &[7], "/"));
        // A number is a uid, even where a user has such a name.
        assert_eq!(resolve("2000", PASSWD, GROUP), user(2000, 0, &[0], "/"));
        assert_eq!(resolve("4242", PASSWD, GROUP), user(4242, 0, &[0], "/"));
    }

    #[test]
    fn groups_are_added_once_each_by_name_or_number() {
        let web = || resolve("web", PASSWD, GROUP).expect("is there");
        let added = |more: &[&str]| {
            let more: Vec<String> = more.iter().map(|name| (*name).to_owned()).collect();
            web().and_in(&more, GROUP)
        };
        let with = |groups: &[u32]| user(1000, 1001, groups, "/srv/web");
        assert_eq!(added(&[]), with(&[1001, 4, 44]));
        assert_eq!(
            added(&["bin", "video", "77", "1"]),
            with(&[1001, 4, 44, 1, 77])
        );
        assert_eq!(
            added(&["nowhere"]),
            Err(NoSuch::Group("nowhere".to_owned()))
        );
    }

    #[test]
    fn a_group_replaces_all_groups_of_the_user() {
        let in_video = user(1000, 44, &[44], "/srv/web");
        assert_eq!(resolve("web:video", PASSWD, GROUP), in_video);
        assert_eq!(resolve("1000:44", PASSWD, GROUP), in_video);
        assert_eq!(
            resolve("web:77", PASSWD, GROUP),
            user(1000, 77, &[77], "/srv/web")
        );
        assert_eq!(resolve(":44", PASSWD, GROUP), user(0, 44, &[44], "/root"));
        assert_eq!(
            resolve("web:", PASSWD, GROUP),
            resolve("web", PASSWD, GROUP)
        );
    }

    #[test]
    fn strangers_are_refused() {
        let refused = |spec| resolve(spec, PASSWD, GROUP).unwrap_err();
        assert_eq!(refused("ghost"), NoSuch::User("ghost".into()));
        assert_eq!(refused("broken"), NoSuch::User("broken".into()));
        assert_eq!(refused("-1"), NoSuch::User("-1".into()));
        assert_eq!(refused("web:ghosts"), NoSuch::Group("ghosts".into()));
        assert_eq!(refused("2147483648"), NoSuch::Range("2147483648".into()));
        assert_eq!(
            refused("0:99999999999"),
            NoSuch::Range("99999999999".into())
        );
    }
}
