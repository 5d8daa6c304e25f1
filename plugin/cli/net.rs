//! `xl vne-snapshot net`, and what the hotplug script and the daemon have done
//! to VNEs' own networks by the hidden command.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};

use log::Level;
use serde::Serialize;

use super::config::VneConfig;
use super::units::table;
use super::{hostconf, print, print_json, take, Failure, Host};
use crate::image::Name;
use crate::net::overlay::{self, Lock, Network, Peers, Seen, Settings};
use crate::net::Rtnl;
use crate::sentence::sentence;
use crate::sidecar::conf::{Conf, Peer};

/// Show the networks of VNEs on this host.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Only that of this VNE
    vne: Option<Name>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

/// A network, as it's printed.
#[derive(Debug, Serialize)]
pub(super) struct Shown {
    pub(super) vne: String,
    pub(super) bridge: String,
    pub(super) mtu: u32,
    pub(super) up: bool,
    /// None if the VNE is on this host alone.
    pub(super) tunnel: Option<ShownTunnel>,
    pub(super) vifs: Vec<String>,
}

#[derive(Debug, Serialize)]
pub(super) struct ShownTunnel {
    pub(super) interface: String,
    pub(super) vni: u32,
    pub(super) port: u16,
    /// None if it depends on the peer.
    pub(super) local: Option<IpAddr>,
    pub(super) peers: Vec<ShownPeer>,
}

#[derive(Debug, Serialize)]
pub(super) struct ShownPeer {
    /// None if no peer is known by this address.
    pub(super) name: Option<Name>,
    pub(super) address: IpAddr,
}

/// Runs the verb.
pub fn run(host: &Host, arguments: &Arguments) -> Result<(), Failure> {
    let wanted = |seen: &Seen| {
        let only = arguments.vne.as_ref();
        only.is_none_or(|only| only.as_str() == seen.vne)
    };
    let seen = overlay::seen(&mut Rtnl::open()?)?;
    let names = names(&hostconf::load(&host.config_dir)?);
    let shown: Vec<Shown> = seen
        .into_iter()
        .filter(wanted)
        .map(|seen| show(seen, &names))
        .collect();
    if arguments.json {
        print_json(&shown)
    } else {
        print(&describe(&shown))
    }
}

/// What peers are called, by where they are.
fn names(conf: &Conf) -> BTreeMap<IpAddr, Name> {
    let mut names = BTreeMap::new();
    for peer in &conf.peers {
        for ip in addresses(peer) {
            names.insert(ip, peer.name.clone());
        }
    }
    names
}

fn show(seen: Seen, names: &BTreeMap<IpAddr, Name>) -> Shown {
    let peer = |address: IpAddr| ShownPeer {
        name: names.get(&address).cloned(),
        address,
    };
    Shown {
        vne: seen.vne,
        bridge: seen.bridge,
        mtu: seen.mtu,
        up: seen.up,
        tunnel: seen.tunnel.map(|tunnel| ShownTunnel {
            interface: tunnel.interface,
            vni: tunnel.vni,
            port: tunnel.port,
            local: tunnel.local,
            peers: tunnel.peers.into_iter().map(peer).collect(),
        }),
        vifs: seen.vifs,
    }
}

fn describe(networks: &[Shown]) -> String {
    let mut rows = vec![["VNE", "BRIDGE", "VNI", "PORT", "MTU", "PEERS", "VIFS"]
        .map(String::from)
        .to_vec()];
    let or_none = |text: String| match text.is_empty() {
        true => String::from("-"),
        false => text,
    };
    rows.extend(networks.iter().map(|network| {
        let tunnel = network.tunnel.as_ref();
        let peers = tunnel.map_or(&[][..], |tunnel| &tunnel.peers);
        let peers: Vec<String> = peers
            .iter()
            .map(|peer| match &peer.name {
                Some(name) => format!("{name}={}", peer.address),
                None => peer.address.to_string(),
            })
            .collect();
        vec![
            network.vne.clone(),
            network.bridge.clone(),
            or_none(tunnel.map_or(String::new(), |tunnel| tunnel.vni.to_string())),
            or_none(tunnel.map_or(String::new(), |tunnel| tunnel.port.to_string())),
            network.mtu.to_string(),
            or_none(peers.join(",")),
            or_none(network.vifs.join(",")),
        ]
    }));
    table(&rows)
}

/// Makes a VNE's network on this host, or makes it what it should be, and prints
/// the name of its bridge.
pub fn up(host: &Host, vne: &Name) -> Result<(), Failure> {
    let plan = Plan::of(host, vne, Level::Warn)?;
    let lock = Lock::take(&host.run_dir)?;
    plan.carry_out(&lock)?;
    print(&format!("{}\n", plan.network.bridge()))
}

/// Removes a VNE's network from this host unless it's in use.
pub fn down(host: &Host, vne: &Name) -> Result<(), Failure> {
    // What it's called doesn't depend on its description.
    let network = Network::of(vne.as_str(), Settings::default());
    let lock = Lock::take(&host.run_dir)?;
    network.down(&lock, &mut Rtnl::open()?)?;
    Ok(())
}

/// Makes all networks that are there what they should be by now.
pub fn follow(host: &Host) -> Result<(), Failure> {
    let mut result = Ok(());
    for vne in overlay::vnes(&mut Rtnl::open()?)? {
        let followed = Name::new(&vne)
            .map_err(Failure::from)
            .and_then(|vne| follow_one(host, &vne));
        if let Err(error) = followed {
            log::error!("{}", sentence(error.as_ref()));
            result = Err(format!("the network of VNE '{vne}' stays as it was").into());
        }
    }
    result
}

fn follow_one(host: &Host, vne: &Name) -> Result<(), Failure> {
    // The daemon has this done every minute.
    let plan = Plan::of(host, vne, Level::Info)?;
    let lock = Lock::take(&host.run_dir)?;
    // It may have gone while peers were looked for, and mustn't come back.
    let there = overlay::vnes(&mut Rtnl::open()?)?;
    match there.iter().any(|there| there == vne.as_str()) {
        true => plan.carry_out(&lock),
        false => Ok(()),
    }
}

/// What a VNE's network should be.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    network: Network,
    /// None if the VNE isn't described here: whoever made its network knows, such
    /// as a restore of a copy.
    peers: Option<Peers>,
}

impl Plan {
    /// What can't be reached is told at this level.
    fn of(host: &Host, vne: &Name, told: Level) -> Result<Self, Failure> {
        let conf = hostconf::load(&host.config_dir)?;
        let Some(config) = VneConfig::find(host, vne)? else {
            log::log!(
                told,
                "VNE '{vne}' isn't described here: its network gets no way to other hosts"
            );
            return Ok(Self {
                network: Network::of(vne.as_str(), Settings::default()),
                peers: None,
            });
        };
        let members = take::placed(&config.members, &conf.name)?;
        let hosts: BTreeSet<Name> = members.into_iter().map(|member| member.host).collect();
        Ok(Self {
            network: Network::of(vne.as_str(), config.network),
            peers: Some(peers(&conf, vne, &hosts, told)),
        })
    }

    fn carry_out(&self, lock: &Lock) -> Result<(), Failure> {
        let mut rtnl = Rtnl::open()?;
        self.network.up(lock, &mut rtnl, self.peers.as_ref())?;
        Ok(())
    }
}

/// Where the other hosts of a VNE are. One that isn't its peer gets nothing.
fn peers(conf: &Conf, vne: &Name, hosts: &BTreeSet<Name>, told: Level) -> Peers {
    let mut incomplete = false;
    let mut found = Vec::new();
    for host in hosts.iter().filter(|host| **host != conf.name) {
        let Some(peer) = conf.peer(host).filter(|peer| peer.may(vne)) else {
            log::log!(
                told,
                "VNE '{vne}' has members on host '{host}', which isn't its peer here: they can't \
                 be reached until it is (xl vne-snapshot peer add)"
            );
            continue;
        };
        let addresses = addresses(peer);
        if addresses.is_empty() {
            log::log!(told, "peer '{host}': {} can't be resolved", peer.address);
            incomplete = true;
        }
        found.push(addresses);
    }
    found.retain(|addresses| !addresses.is_empty());
    // All by IPv4 if they can be, since that carries full packets anywhere.
    let by_ipv4 = found
        .iter()
        .all(|addresses| addresses.iter().any(IpAddr::is_ipv4));
    let chosen = found.iter().filter_map(|addresses| {
        let fits = |ip: &&IpAddr| ip.is_ipv4() == by_ipv4;
        addresses.iter().find(fits).or(addresses.first()).copied()
    });
    Peers {
        addresses: chosen.collect(),
        incomplete,
    }
}

/// A peer's addresses; none if its name can't be resolved.
fn addresses(peer: &Peer) -> Vec<IpAddr> {
    let resolved = peer.address.to_socket_addrs();
    resolved.map_or_else(
        |error| {
            log::debug!("{}: {error}", peer.address);
            Vec::new()
        },
        |found| found.map(|address: SocketAddr| address.ip()).collect(),
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn conf() -> Conf {
        let peer = |item: &str| item.parse().unwrap();
        let fingerprint = |digit: &str| digit.repeat(32);
        Conf {
            name: Name::new("alpha").unwrap(),
            listen: None,
            store_key: None,
            store_memory_mib: None,
            accept_members: Vec::new(),
            peers: vec![
                peer(&format!(
                    "name=beta,address=10.0.0.2,fingerprint={},vne=lab",
                    fingerprint("b")
                )),
                peer(&format!(
                    "name=gamma,address=10.0.0.3,fingerprint={},vne=web",
                    fingerprint("c")
                )),
                peer(&format!(
                    "name=delta,address=[fd00::4],fingerprint={},vne=six,vne=web",
                    fingerprint("d")
                )),
                peer(&format!(
                    "name=lost,address=nowhere.invalid,fingerprint={},vne=lab",
                    fingerprint("e")
                )),
            ],
        }
    }

    fn peers_of(vne: &str, hosts: &[&str]) -> (Vec<String>, bool) {
        let hosts = hosts.iter().map(|host| Name::new(host).unwrap());
        let vne = Name::new(vne).unwrap();
        let found = peers(&conf(), &vne, &hosts.collect(), Level::Debug);
        let addresses = found.addresses.iter().map(IpAddr::to_string);
        (addresses.collect(), found.incomplete)
    }

    #[test]
    fn frames_go_to_the_hosts_of_the_description_that_are_peers_for_the_vne() {
        let only = |ip: &str| (vec![ip.to_owned()], false);
        assert_eq!(peers_of("lab", &["alpha", "beta"]), only("10.0.0.2"));
        assert_eq!(
            peers_of("lab", &["alpha", "beta", "gamma", "x"]),
            only("10.0.0.2")
        );
        assert_eq!(peers_of("six", &["delta"]), only("fd00::4"));
        assert_eq!(peers_of("lab", &["alpha"]), (Vec::new(), false));
        assert_eq!(peers_of("web", &["gamma", "delta"]).0.len(), 2);
    }

    #[test]
    fn a_peer_that_cannot_be_resolved_makes_it_incomplete() {
        let (found, incomplete) = peers_of("lab", &["beta", "lost"]);
        assert_eq!((found, incomplete), (vec![String::from("10.0.0.2")], true));
    }

    #[test]
    fn what_is_shown() {
        let seen = |vne: &str, tunnel| Seen {
            vne: vne.to_owned(),
            bridge: format!("vne-{vne}"),
            mtu: 1500,
            up: true,
            vifs: vec![String::from("vif1.0"), String::from("vif2.0")],
            tunnel,
        };
        let tunnel = overlay::Tunnel {
            interface: String::from("vx-lab"),
            vni: 7,
            port: 4789,
            local: None,
            peers: [[10, 0, 0, 2], [10, 9, 9, 9]].map(IpAddr::from).into(),
        };
        let names = names(&conf());
        let shown = [seen("lab", Some(tunnel)), seen("solo", None)];
        let told = describe(&shown.map(|seen| show(seen, &names)));
        let lines: Vec<Vec<&str>> = told
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        let vifs = "vif1.0,vif2.0";
        assert_eq!(
            lines[1],
            [
                "lab",
                "vne-lab",
                "7",
                "4789",
                "1500",
                "beta=10.0.0.2,10.9.9.9",
                vifs
            ]
        );
        assert_eq!(lines[2], ["solo", "vne-solo", "-", "-", "1500", "-", vifs]);
    }
}
