//! What `/etc/xen/vne.conf` says, as data: which hosts this one talks to. The
//! daemon gets it as JSON, since reading xl's syntax takes libxlutil.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::tls::Fingerprint;
use crate::image::{self, KeySource, Name};

/// Where a daemon listens, and is looked for, if no port is named.
pub const DEFAULT_PORT: u16 = 7791;
/// Peers, at most: far more hosts than a VNE can be spread over.
pub const PEERS_MAX: usize = 256;
/// VNEs that one peer may take part in, at most.
pub const PEER_VNES_MAX: usize = 1024;
/// Bytes in a host's name, at most (RFC 1035).
const HOST_BYTES_MAX: usize = 253;

/// Why something can't be a part of the configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a host's name.
    #[error("{name:?} can't name a host: {problem}")]
    BadName {
        /// What was given.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Not where a peer can be reached.
    #[error("{text:?} is no address of a peer; they look like 10.0.0.2:7791, [2001:db8::2]:7791 or beta.example:7791")]
    BadAddress {
        /// What was given.
        text: String,
    },
    /// Not where a daemon can listen.
    #[error("{text:?} is no address to listen at; they look like 0.0.0.0:7791 or [::]:7791")]
    BadListen {
        /// What was given.
        text: String,
    },
    /// A peer without something that it has to have.
    #[error("the peer {item:?} has no {missing}; peers look like \"{EXAMPLE}\"")]
    Incomplete {
        /// The peer, as it's written.
        item: String,
        /// The part.
        missing: &'static str,
    },
    /// A peer with something that means nothing, or for the second time.
    #[error("the peer {item:?} makes no sense at {part:?}; peers look like \"{EXAMPLE}\"")]
    BadPart {
        /// The peer, as it's written.
        item: String,
        /// The part.
        part: String,
    },
    /// A peer with a value that is none.
    #[error("the peer {item:?} can't be used")]
    BadPeer {
        /// The peer, as it's written.
        item: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Two hosts with one name.
    #[error("two peers are called '{name}'; names must differ")]
    SameName {
        /// The name.
        name: Name,
    },
    /// A peer and this host with one name.
    #[error("a peer is called '{name}', as this host itself is; names must differ")]
    OwnName {
        /// The name.
        name: Name,
    },
    /// Two peers that could not be told from each other.
    #[error("the peers '{first}' and '{second}' have the same fingerprint; each host needs an identity of its own")]
    SameFingerprint {
        /// One.
        first: Name,
        /// The other.
        second: Name,
    },
    /// More peers than anybody has.
    #[error("there are {count} peers, and at most {PEERS_MAX} can be")]
    TooManyPeers {
        /// How many.
        count: usize,
    },
    /// More VNEs than anybody has.
    #[error("peer '{name}' has {count} VNEs, and at most {PEER_VNES_MAX} can be")]
    TooManyVnes {
        /// The peer.
        name: Name,
        /// How many.
        count: usize,
    },
}

const EXAMPLE: &str = "name=beta,address=10.0.0.2:7791,fingerprint=3f2a-…,vne=lab";

/// What the file says. From JSON it comes checked; who builds one calls
/// [`Conf::check`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct Conf {
    /// This host's name among its peers.
    pub name: Name,
    /// ADDRESS:PORT where peers' connections are taken; without it none are.
    pub listen: Option<String>,
    /// The hosts that this one talks to.
    pub peers: Vec<Peer>,
    /// The peers that say which members run here, and how those are configured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub accept_members: Vec<Name>,
    /// Where the key of this host's stores comes from; they are plain without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store_key: Option<KeySource>,
    /// MiB that members may take together while they are stored or read back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store_memory_mib: Option<u32>,
}

/// Another host, and what it may have a part in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its name, which is also what it calls itself.
    pub name: Name,
    /// HOST:PORT where its daemon listens.
    pub address: String,
    /// What it's recognised by.
    pub fingerprint: Fingerprint,
    /// The VNEs that it may have members of.
    pub vnes: Vec<Name>,
}

#[derive(Deserialize)]
struct Unchecked {
    name: Name,
    #[serde(default)]
    listen: Option<String>,
    #[serde(default)]
    peers: Vec<Peer>,
    #[serde(default)]
    accept_members: Vec<Name>,
    #[serde(default)]
    store_key: Option<KeySource>,
    #[serde(default)]
    store_memory_mib: Option<u32>,
}

impl TryFrom<Unchecked> for Conf {
    type Error = Error;

    fn try_from(from: Unchecked) -> Result<Self, Error> {
        let conf = Conf {
            name: from.name,
            listen: from.listen,
            peers: from.peers,
            accept_members: from.accept_members,
            store_key: from.store_key,
            store_memory_mib: from.store_memory_mib,
        };
        conf.check()?;
        Ok(conf)
    }
}

impl Conf {
    /// Bytes that members may take together while they are stored or read back.
    pub fn store_memory_bytes(&self) -> Option<u64> {
        self.store_memory_mib.map(|mib| u64::from(mib) << 20)
    }

    /// Whether this makes sense as a whole.
    ///
    /// # Errors
    ///
    /// The first thing that doesn't.
    pub fn check(&self) -> Result<(), Error> {
        if let Some(listen) = &self.listen {
            listen_address(listen)?;
        }
        let count = self.peers.len();
        if count > PEERS_MAX {
            return Err(Error::TooManyPeers { count });
        }
        let mut names = BTreeSet::new();
        for peer in &self.peers {
            peer_address(&peer.address)?;
            let (name, count) = (peer.name.clone(), peer.vnes.len());
            if count > PEER_VNES_MAX {
                return Err(Error::TooManyVnes { name, count });
            }
            if name == self.name {
                return Err(Error::OwnName { name });
            }
            if !names.insert(&peer.name) {
                return Err(Error::SameName { name });
            }
            let first = self.peer_by(&peer.fingerprint);
            if let Some(first) = first.filter(|first| first.name != name) {
                return Err(Error::SameFingerprint {
                    first: first.name.clone(),
                    second: name,
                });
            }
        }
        Ok(())
    }

    /// The peer of this name.
    pub fn peer(&self, name: &Name) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.name == *name)
    }

    /// The peer with this certificate.
    pub fn peer_by(&self, fingerprint: &Fingerprint) -> Option<&Peer> {
        let is_it = |peer: &&Peer| peer.fingerprint == *fingerprint;
        self.peers.iter().find(is_it)
    }
}

impl Peer {
    /// Whether it may have members of this VNE.
    pub fn may(&self, vne: &Name) -> bool {
        self.vnes.contains(vne)
    }
}

/// As in the file.
impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Peer {
            name,
            address,
            fingerprint,
            vnes,
        } = self;
        write!(f, "name={name},address={address},fingerprint={fingerprint}")?;
        vnes.iter().try_for_each(|vne| write!(f, ",vne={vne}"))
    }
}

impl FromStr for Peer {
    type Err = Error;

    fn from_str(item: &str) -> Result<Self, Error> {
        let bad = |source: Box<dyn std::error::Error + Send + Sync>| Error::BadPeer {
            item: item.to_owned(),
            source,
        };
        let (mut name, mut address, mut fingerprint) = (None, None, None);
        let mut vnes = Vec::new();
        for part in item.split(',') {
            let twice_or_unknown = || Error::BadPart {
                item: item.to_owned(),
                part: part.to_owned(),
            };
            let (key, value) = part.split_once('=').ok_or_else(twice_or_unknown)?;
            match (key.trim(), value.trim()) {
                ("name", value) if name.is_none() => {
                    name = Some(host_name(value).map_err(|error| bad(error.into()))?);
                }
                ("address", value) if address.is_none() => {
                    address = Some(peer_address(value).map_err(|error| bad(error.into()))?);
                }
                ("fingerprint", value) if fingerprint.is_none() => {
                    let read: Result<Fingerprint, _> = value.parse();
                    fingerprint = Some(read.map_err(|error| bad(error.into()))?);
                }
                ("vne", value) => vnes.push(Name::new(value).map_err(|error| bad(error.into()))?),
                _ => return Err(twice_or_unknown()),
            }
        }
        let lacks = |missing| Error::Incomplete {
            item: item.to_owned(),
            missing,
        };
        Ok(Peer {
            name: name.ok_or_else(|| lacks("name"))?,
            address: address.ok_or_else(|| lacks("address"))?,
            fingerprint: fingerprint.ok_or_else(|| lacks("fingerprint"))?,
            vnes,
        })
    }
}

/// A host's name; the rules are those for a VNE's.
///
/// # Errors
///
/// [`Error::BadName`].
pub fn host_name(text: &str) -> Result<Name, Error> {
    Name::new(text).map_err(|error| Error::BadName {
        name: text.to_owned(),
        problem: match error {
            image::Error::BadName { problem, .. } => problem,
            _ => "it isn't a name",
        },
    })
}

/// HOST or HOST:PORT as HOST:PORT. An IPv6 address is in brackets, as its
/// last part could as well be a port.
///
/// # Errors
///
/// [`Error::BadAddress`].
pub fn peer_address(text: &str) -> Result<String, Error> {
    let bad = || Error::BadAddress {
        text: text.to_owned(),
    };
    let (host, rest) = match text.strip_prefix('[') {
        Some(inner) => {
            let (inner, rest) = inner.split_once(']').ok_or_else(bad)?;
            let address: Ipv6Addr = inner.parse().map_err(|_| bad())?;
            (format!("[{address}]"), rest)
        }
        None => {
            let at = text.find(':').unwrap_or(text.len());
            let (host, rest) = text.split_at(at);
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
            if host.is_empty() || host.len() > HOST_BYTES_MAX || !host.bytes().all(allowed) {
                return Err(bad());
            }
            (host.to_owned(), rest)
        }
    };
    let port = match rest.strip_prefix(':') {
        Some(port) => port_number(port).ok_or_else(bad)?,
        None if rest.is_empty() => DEFAULT_PORT,
        None => return Err(bad()),
    };
    Ok(format!("{host}:{port}"))
}

/// ADDRESS or ADDRESS:PORT as ADDRESS:PORT. Names aren't taken: what they
/// stand for may change, and with it who can connect.
///
/// # Errors
///
/// [`Error::BadListen`].
pub fn listen_address(text: &str) -> Result<String, Error> {
    let bad = || Error::BadListen {
        text: text.to_owned(),
    };
    let whole = peer_address(text).map_err(|_| bad())?;
    let address: SocketAddr = whole.parse().map_err(|_| bad())?;
    Ok(address.to_string())
}

/// Whether a daemon that listens there can be reached by every address that
/// its host has.
pub fn is_any_address(listen: &str) -> bool {
    let address: Option<SocketAddr> = listen.parse().ok();
    address
        .map(|address| address.ip())
        .is_some_and(|ip| match ip {
            IpAddr::V4(ip) => ip.is_unspecified(),
            IpAddr::V6(ip) => ip.is_unspecified(),
        })
}

/// Digits only: Rust takes "+7791" too.
fn port_number(text: &str) -> Option<u16> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let port = text.parse().ok().filter(|&port| port > 0);
    port.filter(|_| digits)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    fn peer(called: &str, digit: char) -> Peer {
        Peer {
            name: name(called),
            address: String::from("10.0.0.2:7791"),
            fingerprint: String::from(digit).repeat(32).parse().unwrap(),
            vnes: vec![name("lab"), name("web")],
        }
    }

    fn conf(peers: Vec<Peer>) -> Conf {
        Conf {
            name: name("alpha"),
            listen: Some(String::from("0.0.0.0:7791")),
            peers,
            accept_members: Vec::new(),
            store_key: None,
            store_memory_mib: None,
        }
    }

    #[test]
    fn peers_are_found_by_name_and_by_fingerprint() {
        let conf = conf(vec![peer("beta", 'b'), peer("gamma", 'c')]);
        assert!(conf.check().is_ok());
        let gamma = conf.peer(&name("gamma"));
        assert_eq!(gamma, conf.peer_by(&peer("x", 'c').fingerprint));
        assert!(gamma.is_some_and(|peer| peer.may(&name("web")) && !peer.may(&name("we"))));
        assert_eq!(conf.peer(&name("alpha")), None);
        assert_eq!(conf.peer_by(&peer("x", 'd').fingerprint), None);
    }

    #[test]
    fn hosts_that_cannot_be_told_apart_are_refused() {
        for (peers, expected) in [
            (vec![peer("beta", 'b'), peer("beta", 'c')], "'beta'"),
            (vec![peer("alpha", 'b')], "this host itself"),
            (
                vec![peer("beta", 'b'), peer("gamma", 'b')],
                "'beta' and 'gamma'",
            ),
        ] {
            let error = conf(peers).check().unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn there_is_a_limit_on_everything() {
        let peers = (0..PEERS_MAX).map(|at| {
            let fingerprint = format!("{at:032x}").parse().unwrap();
            Peer {
                fingerprint,
                ..peer(&format!("p{at}"), '0')
            }
        });
        let mut conf = conf(peers.collect());
        conf.peers[0].vnes = vec![name("lab"); PEER_VNES_MAX];
        assert!(conf.check().is_ok());
        conf.peers[0].vnes.push(name("web"));
        assert!(matches!(conf.check(), Err(Error::TooManyVnes { .. })));
        conf.peers[0].vnes.clear();
        conf.peers.push(peer("one-more", 'f'));
        assert!(matches!(conf.check(), Err(Error::TooManyPeers { .. })));
    }

    #[test]
    fn json_comes_back_as_it_was_and_is_checked() {
        let good = conf(vec![peer("beta", 'b')]);
        let text = serde_json::to_string(&good).unwrap();
        assert!(text.contains("\"bbbb-bbbb-bbbb-bbbb-bbbb-bbbb-bbbb-bbbb\""));
        assert_eq!(serde_json::from_str::<Conf>(&text).unwrap(), good);
        for (from, to) in [
            ("\"beta\"", "\"alpha\""),
            ("10.0.0.2:7791", "10.0.0.2:0"),
            ("bbbb-", "bbb-"),
            ("0.0.0.0", "everywhere"),
        ] {
            assert!(serde_json::from_str::<Conf>(&text.replace(from, to)).is_err());
        }
    }

    #[test]
    fn a_peer_is_read_as_it_is_written() {
        let beta = peer("beta", 'b');
        let text = beta.to_string();
        assert_eq!(text.parse::<Peer>().unwrap(), beta);
        let other = "vne=lab, vne=web, fingerprint=BBBBbbbbBBBBbbbbBBBBbbbbBBBBbbbb, \
                     address = 10.0.0.2 , name=beta";
        assert_eq!(other.parse::<Peer>().unwrap(), beta);
        for (from, to, expected) in [
            ("name=beta,", "", "has no name"),
            ("name=beta", "name=../beta", "can't name a host"),
            ("name=beta", "name=beta,name=beta", "at \"name=beta\""),
            ("vne=lab", "vne", "at \"vne\""),
            ("vne=lab", "port=1", "at \"port=1\""),
            ("10.0.0.2:7791", "10.0.0.2:", "is no address of a peer"),
            ("bbbb,", "bbbg,", "no fingerprint"),
        ] {
            let error = text.replace(from, to).parse::<Peer>().unwrap_err();
            let error = crate::sentence::sentence(&error);
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn addresses() {
        for (text, expected) in [
            ("10.0.0.2", "10.0.0.2:7791"),
            ("10.0.0.2:1", "10.0.0.2:1"),
            ("beta.example", "beta.example:7791"),
            ("[::1]", "[::1]:7791"),
            ("[2001:DB8:0::2]:65535", "[2001:db8::2]:65535"),
        ] {
            assert_eq!(peer_address(text).unwrap(), expected);
        }
        for bad in [
            "", ":1", "a:", "a:0", "a:65536", "a:+1", "a b", "a,b", "a\"", "::1", "[::1", "[::1]1",
            "[a]:1", "é",
        ] {
            assert!(peer_address(bad).is_err(), "{bad}");
        }
        assert_eq!(listen_address("[::]").unwrap(), "[::]:7791");
        assert_eq!(listen_address("10.0.0.1:5").unwrap(), "10.0.0.1:5");
        assert!(listen_address("localhost:5").is_err());
        assert!(is_any_address("[::]:7791") && is_any_address("0.0.0.0:1"));
        assert!(!is_any_address("10.0.0.1:1"));
    }
}
